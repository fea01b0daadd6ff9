"""Activations and gradients of single samples together: GBLM's score of what a consumer reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.accumulators import Norms, Statistic, Weights
from importance.activation import Activation, Criterion, by_channel
from importance.calling import check_batches
from importance.choices import pick
from importance.collector import Gathering
from importance.consumers import Consumer
from importance.gradients import ElementSums, backwards, require_module
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.progress import shown
from importance.reduction import Reduction, ReductionSpec
from importance.samples import require_samples_first, samples_of
from importance.statistics import Statistics, collect

NORMS = {
    "l2": (lambda gradient: gradient.abs().square_(), torch.sqrt),
    "l1": (torch.abs, lambda total: total),
}


@dataclass(frozen=True)
class GradientBlend:
    """GBLM (METHODS.md 2.18) by columns: mean_i |W_ij| (||X_j|| / sqrt(N) + |g_ij|), W the weights that read channel j.

    |g_ij| is the norm over the N samples, each alone, of `scale` times the gradient of W_ij. Without gradients this is
    Wanda-sp. Where what is multiplied with a channel is computed (queries that meet keys), the gradient has no part. It costs
    a forward pass over the batches and a backward pass for each sample, and holds one float32 for each weight of a consumer.
    An axis without consumers goes last, by the size of its weights.

    Args:
        batches: an iterable of tensors, tuples (arguments) or dicts (keyword arguments), with samples along the first dim of
            all their tensors.
        loss: `loss(output, batch)` -> scalar; None takes the model's own loss, or next-token cross-entropy.
        norm: over samples: "l2" or "l1".
        scale: of gradients beside activations, the authors' 100.
        reduction: over the consumers of an axis: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        gathering: precision of the activations' sums, whose consumers are looked at.
        progress: show a bar on stderr.

    Raises, when called: DataError and ScoreError as `Activation` and `Fisher` do.
    """

    comparable: ClassVar[bool] = False
    needs: ClassVar[tuple[Statistic, ...]] = (Norms(), Weights("absolute"))

    gradients: ClassVar[bool] = True

    batches: Iterable[Any]
    loss: Loss | None = None
    norm: str = "l2"
    scale: float = 100.0
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    gathering: Gathering = field(default_factory=Gathering)
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(NORMS, self.norm, "norm over samples")
        if not 0 <= self.scale < float("inf"):
            raise ScoreError(f"the scale of gradients must be a finite number of at least 0, it is {self.scale}")
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_module(graph, type(self).__name__)
        batches = list(self.batches) if isinstance(self.batches, Iterator) else self.batches
        found = collect(graph, batches, self.needs, self.gathering)
        sums = self._gradients(found, batches)
        root = NORMS[self.norm][1]

        def formula(consumer: Consumer, found: Statistics) -> Tensor:
            activations = found.of(consumer, Norms()).norm
            wanda = found.of(consumer, Weights("absolute")).value.to(activations) * activations
            if not consumer.weight:
                return wanda
            weight = graph.tensor(consumer.weight)
            return wanda + self.scale * column_means(consumer, weight, root(sums.total(weight))).to(wanda)

        return Activation(found, Criterion(self.needs, by_channel(formula)), self.reduction, self.normalise)(graph)

    def _gradients(self, found: Statistics, batches: Iterable[Any]) -> ElementSums:
        """For each weight of a consumer, the sum over samples of its gradient's absolute or square."""
        require_samples_first(found.graph)
        tensors = found.graph.tensors()
        weights = {c.weight: tensors[c.weight] for c in found.consumers if c.weight and c.key in found.found}
        hook = ElementSums(NORMS[self.norm][0])
        with backwards(found.graph.model, weights, self.loss, hook) as backward:
            for batch in shown(batches, "scoring with gradients", self.progress):
                for sample in samples_of(batch):
                    backward(sample)
        return hook


@torch.no_grad()
def column_means(consumer: Consumer, weight: Tensor, factor: Tensor) -> Tensor:
    """mean_i |W_ij| factor_ij for every channel j of a consumer: every group of a convolution has channels of its own."""
    element = (weight.detach().to(factor) if not weight.is_complex() else weight.detach()).abs() * factor
    moved = element.movedim(consumer.weight_dim, -1)
    own = moved.shape[-1]
    means = moved.reshape(consumer.size // own, -1, own).mean(dim=1).flatten()
    if not bool(torch.isfinite(means).all()):
        raise ScoreError(f"NaN or infinite gradients of {consumer.weight!r}: look at the loss and the batches")
    return means
