"""First-order Taylor saliency: how far the loss would move if the group were zero, to first order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from depgraph import DependencyGraph
from importance.calling import check_batches
from importance.choices import pick
from importance.gradients import GradientSums, backwards, require_module
from importance.layout import Layout
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.progress import shown
from importance.reduction import Reduction, ReductionSpec
from importance.samples import largest_size
from importance.sums import Saliency


def _signed(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient.conj()).real


def _unsigned(weight: Tensor, gradient: Tensor) -> Tensor:
    return _signed(weight, gradient).abs_()


FORMS: dict[str, Saliency] = {"element": _unsigned, "vector": _signed}
ACCUMULATE = {"abs": "gradients are consumed batch by batch", "signed": "gradients are added up over all batches first"}


@dataclass(frozen=True)
class Taylor:
    """First-order saliency S = W * G with G = d loss / d W: LLM-Pruner's Element-1 and Vector (METHODS.md 2.1).

    Index j of a tensor's dim scores sum_k |S_jk| (`form="element"`) or |sum_k S_jk| (`form="vector"`), k running over
    all other dims. A group sums the indices it has in each tensor, then (by default) the tensors. Scores aren't
    normalised: they are changes of one loss and compare across axes.

    With several batches, `accumulate="abs"` adds up the |S| of each: every gradient is consumed and freed while the
    backward pass makes the next, so that the peak is the weights and one gradient, whatever the number of batches. The
    paper takes the absolute value once, of the gradient of all samples together. The two are the same for one batch;
    for more, `accumulate="signed"` gives the paper's value (up to a factor: batches are added, not averaged) and holds
    all gradients at once. A loss being the mean over a batch, a batch counts by its samples: one with half as many as the first
    counts half, so that it doesn't matter to "signed" how samples were put into batches.

    The model runs in eval mode without a key-value cache; frozen parameters are scored like others. Its gradients,
    `requires_grad`, mode and the random state are put back, also after an error.

    Args:
        batches: an iterable of tensors (the single argument), tuples (arguments) or dicts (keyword arguments).
        loss: `loss(output, batch)` -> scalar; None takes the model's own loss (put labels into the batches), or
            next-token cross-entropy for a language model.
        reduction: over members: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        form: "element" or "vector".
        accumulate: "abs" or "signed".
        progress: show a bar on stderr.

    Raises, when called:
        DataError: there are no batches, or one doesn't fit the model.
        ScoreError: no loss can be found, or loss, weights or gradients are NaN or infinite, or a parameter can't have any
            (made in inference mode); an unknown name, at once.
    """

    gradients: ClassVar[bool] = True

    batches: Iterable[Any]
    loss: Loss | None = None
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    form: str = "element"
    accumulate: str = "abs"
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)
        pick(FORMS, self.form, "form of Taylor saliency")
        pick(ACCUMULATE, self.accumulate, "way to accumulate gradients")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_module(graph, type(self).__name__)
        layout = Layout.of(graph)
        if not layout.parameters:
            return {}
        consumer = GradientSums(layout, FORMS[self.form])
        each_batch, first = self.accumulate == "abs", 0
        with backwards(graph.model, layout.parameters, self.loss, consumer if each_batch else None) as backward:
            for batch in shown(self.batches, "scoring with gradients", self.progress):
                first = first or largest_size(batch)
                share = largest_size(batch) / max(first, 1)
                consumer.share = share if each_batch else 1.0
                backward(batch, lambda loss, share=share: loss if each_batch else loss * share)
            if not each_batch:
                for parameter in layout.parameters.values():
                    consumer(parameter)
        return layout.scores(consumer.sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))
