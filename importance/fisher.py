"""Second-order saliency: gradients of single samples, squared, stand in for the diagonal of the loss's Hessian."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from depgraph import DependencyGraph
from importance.calling import check_batches
from importance.choices import pick
from importance.gradients import ElementSums, GradientSums, backwards, require_module
from importance.layout import Layout, Sums
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.progress import shown
from importance.reduction import Reduction, ReductionSpec
from importance.samples import require_samples_first, sample_count, samples_of
from importance.sums import index_sums

FORMS = {"second": "sum of W^2 F, the samples' squares streamed", "mix": "sum of |W * G - 1/2 W^2 F|, F and G held"}


@dataclass(frozen=True)
class Fisher:
    """Saliency with the diagonal empirical Fisher F = mean over samples of g^2, g a sample's gradient (METHODS.md 2.1, 2.4).

    `form="second"` is LLM-Pruner's Element-2 and, with F for the Hessian's diagonal, optimal brain damage (without its 1/2):
    index j of a tensor's dim scores sum_k W_jk^2 F_jk. It costs one backward pass for each sample, and no memory for F.
    `form="mix"` is sum_k |W * G - 1/2 W * F * W|_jk, with G the gradient of whole batches (the mean over these, weighed by
    their samples): one more backward pass for each batch, and F and G held in float32, twice the weights' memory.

    Batches are split into samples along the first dim of all their tensors. The model runs and is put back as for `Taylor`,
    frozen parameters are scored like others, and scores aren't normalised unless asked for.

    Args:
        batches: an iterable of tensors (the single argument), tuples (arguments) or dicts (keyword arguments).
        loss: `loss(output, batch)` -> scalar; None takes the model's own loss, or next-token cross-entropy.
        reduction: over members: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        form: "second" or "mix".
        progress: show a bar on stderr.

    Raises, when called:
        DataError: there are no batches, one is empty, doesn't fit the model or can't be split into samples.
        ScoreError: as `Taylor`; an unknown name, at once.
    """

    gradients: ClassVar[bool] = True

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
        pick(FORMS, self.form, "form of Fisher saliency")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_module(graph, type(self).__name__)
        require_samples_first(graph)
        layout = Layout.of(graph)
        if not layout.parameters:
            return {}
        sums = self._second(graph, layout) if self.form == "second" else self._mix(graph, layout)
        return layout.scores(sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))

    def _second(self, graph: DependencyGraph, layout: Layout) -> Sums:
        hook = GradientSums(layout, _squared)
        samples = 0
        with backwards(graph.model, layout.parameters, self.loss, hook) as backward:
            for batch in shown(self.batches, "scoring with gradients", self.progress):
                for sample in samples_of(batch):
                    backward(sample)
                    samples += 1
        return {name: {d: part / samples for d, part in parts.items()} for name, parts in hook.sums.items()}

    def _mix(self, graph: DependencyGraph, layout: Layout) -> Sums:
        samples = count = 0
        gradient, squares = ElementSums(lambda g: g * count), ElementSums(lambda g: g.abs().square_())
        hook: list[ElementSums] = [gradient]
        with backwards(graph.model, layout.parameters, self.loss, lambda parameter: hook[0](parameter)) as backward:
            for batch in shown(self.batches, "scoring with gradients", self.progress):
                count = sample_count(batch)
                samples += count
                hook[0] = gradient
                backward(batch)
                hook[0] = squares
                for sample in samples_of(batch):
                    backward(sample)
        return {
            name: index_sums(
                lambda w, g, f: _mixed(w, g / samples, f / samples),
                (parameter, gradient.total(parameter), squares.total(parameter)),
                layout.dims[name],
            )
            for name, parameter in layout.parameters.items()
        }


def _squared(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs().square_()


def _mixed(weight: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    return ((weight * gradient.conj()).real - weight.abs().square() * fisher / 2).abs_()
