"""First-order Taylor saliency: how far the loss would move if the group were zero, to first order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from importance.calling import check_batches
from importance.choices import pick
from importance.gradients import by_id, each_of, passes, take
from importance.layout import Layout
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec
from importance.splitting import sample_count
from importance.sums import Saliency, index_sums


def signed(weight: Tensor, gradient: Tensor) -> Tensor:
    """W * G, a new tensor: how far the loss falls, to first order, if the weight becomes zero."""
    return (weight * gradient.conj()).real


def _unsigned(weight: Tensor, gradient: Tensor) -> Tensor:
    return signed(weight, gradient).abs_()


FORMS: dict[str, Saliency] = {"element": _unsigned, "vector": signed}
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
    all gradients at once. A loss being the mean over a batch, a batch counts by its samples: one with half as many as
    the first counts half, so that it doesn't matter to "signed" how the samples were divided into batches.

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
        ScoreError: no loss can be found, or loss, weights or gradients are NaN or infinite, or the model was made in
            inference mode; an unknown name, at once.
    """

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
        layout = Layout.of(graph)
        if not layout.parameters:
            return {}
        consumer = _Consumer(layout, FORMS[self.form])
        each_batch, first = self.accumulate == "abs", 0
        wanted = layout.parameters.values()
        with passes(graph.model, wanted, self.loss, consumer if each_batch else None) as backward:
            for batch in each_of(self.batches, "scoring with gradients" if self.progress else ""):
                first = first or sample_count(batch)
                consumer.share = sample_count(batch) / max(first, 1)
                backward(batch, 1.0 if each_batch else consumer.share)
            if not each_batch:
                consumer.share = 1.0
                for parameter in wanted:
                    take(parameter, consumer)
        return layout.scores(consumer.sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))


class _Consumer:
    """Adds the saliency of a parameter's gradient, summed per index, to running sums: `share` of it."""

    def __init__(self, layout: Layout, saliency: Saliency) -> None:
        self.saliency = saliency
        self.dims = layout.dims
        self.names = by_id(layout.parameters)
        self.share = 1.0
        self.sums: dict[str, dict[int, Tensor]] = {
            name: {d: torch.zeros(parameter.shape[d], dtype=torch.float64) for d in self.dims[name]}
            for name, parameter in layout.parameters.items()
        }

    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        name = self.names[id(parameter)]
        found = index_sums(self.saliency, (parameter, gradient), self.dims[name])
        self.sums[name] = {
            d: self.sums[name][d].to(part.device, part.dtype) + part.abs() * self.share for d, part in found.items()
        }
