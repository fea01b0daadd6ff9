"""Second-order Taylor saliency from the empirical Fisher information, the squares of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from importance.calling import check_batches
from importance.choices import pick
from importance.gradients import add_to, by_id, each_of, passes
from importance.layout import Layout, Sums
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec
from importance.splitting import samples_of
from importance.sums import index_sums, wide
from importance.taylor import signed


def _square(weight: Tensor, gradient: Tensor) -> Tensor:
    return signed(weight, gradient).square_()


def _second(scorer: SecondOrder, model: nn.Module, layout: Layout) -> Sums:
    """Per index the sum of W * F * W: linear in F, so that every sample's part is added at once."""
    names = by_id(layout.parameters)
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in layout.parameters}
    count = 0

    def consume(parameter: Tensor, gradient: Tensor) -> None:
        name = names[id(parameter)]
        for d, part in index_sums(_square, (parameter, gradient), layout.dims[name]).items():
            add_to(sums[name], d, part)

    with passes(model, layout.parameters.values(), scorer.loss, consume) as backward:
        for batch in each_of(scorer.batches, scorer.title):
            for sample in samples_of(batch):
                backward(sample, 1.0)
                count += 1
    return _averaged(sums, layout, count)


def _mix(scorer: SecondOrder, model: nn.Module, layout: Layout) -> Sums:
    """Per index the sum of |W * G - 1/2 W * F * W|, of which the part within the bars is added up element by element."""
    names = by_id(layout.parameters)
    held: dict[str, Tensor] = {}
    count, factors = 0, (0.0, 0.0)

    def consume(parameter: Tensor, gradient: Tensor) -> None:
        first = signed(wide(parameter), wide(gradient))
        whole, alone = factors
        add_to(held, names[id(parameter)], whole * first + alone * first.square())

    with passes(model, layout.parameters.values(), scorer.loss, consume) as backward:
        for batch in each_of(scorer.batches, scorer.title):
            samples = samples_of(batch)
            count += len(samples)
            factors = (float(len(samples)), -0.5 if len(samples) == 1 else 0.0)
            backward(batch, 1.0)
            factors = (0.0, -0.5)
            for sample in samples if len(samples) > 1 else ():
                backward(sample, 1.0)
    return _averaged({n: index_sums(torch.abs, (total,), layout.dims[n]) for n, total in held.items()}, layout, count)


def _averaged(sums: Sums, layout: Layout, count: int) -> Sums:
    """Sums over samples divided by their number; zeros for a parameter that no gradient reached."""
    return {
        name: {d: sums.get(name, {}).get(d, torch.zeros(parameter.shape[d])) / count for d in layout.dims[name]}
        for name, parameter in layout.parameters.items()
    }


FORMS: dict[str, Callable[[SecondOrder, nn.Module, Layout], Sums]] = {"second": _second, "mix": _mix}


@dataclass(frozen=True)
class SecondOrder:
    """LLM-Pruner's Element-2 and mix (METHODS.md 2.1), and optimal brain damage with the Fisher diagonal (2.4).

    F, the mean over samples of g * g, stands for the diagonal of the Hessian; g is the gradient of one sample's loss. Index j
    of a tensor's dim scores sum_k (W * F * W)_jk (`form="second"`), or sum_k |W * G - 1/2 W * F * W|_jk (`form="mix"`) with G
    the gradient of the mean loss over all samples. A group sums the indices it has in each tensor, then the tensors.

    Every batch is split into its samples, along the first dim of its tensors (`importance.splitting`), and each sample takes a
    backward pass; mix takes one more for each batch. So it doesn't matter how samples were put into batches, but for G where a
    loss isn't the mean over the samples of a batch. One gradient lives at a time; mix holds one number per weight as well.

    Arguments, what is put back, and errors are those of `Taylor`; a batch that can't be split is a DataError.
    """

    batches: Iterable[Any]
    loss: Loss | None = None
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    form: str = "second"
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)
        pick(FORMS, self.form, "form of second-order saliency")

    @property
    def comparable(self) -> bool:
        """Changes of one loss compare across axes; once they are normalised per axis, they don't."""
        return self.normalise == "none"

    @property
    def title(self) -> str:
        """What a bar is called; empty for none."""
        return "scoring with gradients of samples" if self.progress else ""

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        layout = Layout.of(graph)
        if not layout.parameters:
            return {}
        sums = FORMS[self.form](self, graph.model, layout)
        return layout.scores(sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))
