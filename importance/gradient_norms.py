"""GBLM's gradient term: weights times the size that the gradients of single samples have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from importance.calling import check_batches
from importance.choices import pick
from importance.gradients import add_to, by_id, each_of, passes
from importance.layout import Layout
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec
from importance.splitting import samples_of
from importance.sums import index_sums, wide

NORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "l1": (torch.abs, lambda total: total),
    "l2": (lambda gradient: gradient.abs().square(), torch.sqrt),
}
"""What of each sample's gradient is added up, and what is made of the sum."""


@dataclass(frozen=True)
class Calibration:
    """Where gradients come from: batches to be split into samples, their loss, and the title of a bar, empty for none."""

    batches: Iterable[Any]
    loss: Loss | None = None
    title: str = ""


def gradient_norms(
    graph: DependencyGraph, samples: Calibration, norm: str = "l2", scale: float = 100.0
) -> dict[str, Tensor]:
    """For each parameter that an axis reaches, the norm over samples of `scale` times its gradient, element by element.

    "l2": sqrt(sum_n (scale * g_n)^2), "l1": sum_n |scale * g_n|; float32 (float64 of float64) tensors in the parameter's shape
    on its device, under its first name. One gradient lives at a time, beside these.

    Raises DataError and ScoreError as `Taylor` does, and DataError for a batch that can't be split.
    """
    add, finish = pick(NORMS, norm, "norm of gradients")
    layout = Layout.of(graph)
    names = by_id(layout.parameters)
    held: dict[str, Tensor] = {}

    def consume(parameter: Tensor, gradient: Tensor) -> None:
        add_to(held, names[id(parameter)], add(wide(gradient) * scale))

    if not names:
        return {}
    with passes(graph.model, layout.parameters.values(), samples.loss, consume) as backward:
        for batch in each_of(samples.batches, samples.title):
            for sample in samples_of(batch):
                backward(sample, 1.0)
    return {name: finish(held.get(name, torch.zeros_like(wide(p).real))) for name, p in layout.parameters.items()}


@dataclass(frozen=True)
class GradientNorm:
    """The gradient term of GBLM (METHODS.md 2.18): element score |W| * ||100 g||, over samples.

    Summed over the other dims of a tensor, then over the indices of a group and its tensors. GBLM adds Wanda's term,
    |W| * ||X||, element by element; sums being linear, the two can be added as scores of groups, or their elements by
    whoever holds `gradient_norms`.

    Args:
        batches: as for `Taylor`; they are split into samples.
        loss: as for `Taylor`.
        norm: over samples, "l2" (the paper's) or "l1".
        reduction: over members.
        normalise: per axis.
        progress: show a bar on stderr.

    Raises, when called: DataError and ScoreError as `Taylor` does, and DataError for a batch that can't be split.
    """

    comparable: ClassVar[bool] = False

    batches: Iterable[Any]
    loss: Loss | None = None
    norm: str = "l2"
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)
        pick(NORMS, self.norm, "norm of gradients")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        layout = Layout.of(graph)
        title = "scoring with gradients of samples" if self.progress else ""
        norms = gradient_norms(graph, Calibration(self.batches, self.loss, title), self.norm)
        sums = {n: index_sums(_product, (layout.parameters[n], size), layout.dims[n]) for n, size in norms.items()}
        return layout.scores(sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))


def _product(weight: Tensor, size: Tensor) -> Tensor:
    return weight.abs() * size
