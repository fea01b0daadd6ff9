"""Activation criteria: what a group is worth by what it sends to those who read it.

Every criterion gives each channel that comes into a consumer a number (or each group at once), and these are joined over the
channels of a group, then over the consumers that read it. The papers take the output projection of an attention and the last
linear map of an MLP; here it is whatever operator sums over the axis, so convolutions, gates and streams have scores too.
Where queries meet keys, what is multiplied with a channel is computed and not a weight: it takes the weights' place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from depgraph import Axis, DependencyGraph
from depgraph.classes import NONE
from importance.accumulators import Moments, Norms, SampleMeans, Statistic, Weights
from importance.calling import check_batches
from importance.choices import pick
from importance.collector import Gathering
from importance.consumers import Consumer, channel_scores
from importance.contributions import Contributions, amp
from importance.magnitude import Magnitude
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import WITHIN, Reduction, ReductionSpec, Scored
from importance.statistics import Statistics, collect
from importance.weight_shares import WeightShares

Formula = Callable[[Consumer, Statistics], Tensor]
"""The score of every channel that comes into a consumer, [channels]."""

Rule = Callable[[Consumer, Statistics, str], Scored]
"""The groups of an axis that a consumer reads (-1 where it reads none of a group), and their scores."""


@dataclass(frozen=True)
class Criterion:
    """How a consumer scores the groups that it reads, the statistics that it needs for that, and where it is from."""

    needs: tuple[Statistic, ...]
    rule: Rule
    source: str = ""


def by_channel(formula: Formula, within: str = "sum", normalise: NormalisationSpec = "none") -> Rule:
    """Scores of channels, normalised over those of a consumer, joined over those of a group: by their "sum", "mean" or "l2"."""
    normalisation = Normalisation.of(normalise)

    def rule(consumer: Consumer, statistics: Statistics, axis: str) -> Scored:
        scores = normalisation(channel_scores(consumer, formula(consumer, statistics)))
        return _joined(consumer.labels[axis], scores, within)

    return rule


def _joined(labels: np.ndarray, scores: np.ndarray, within: str) -> Scored:
    read = labels != NONE
    size = int(labels.max()) + 1
    values = scores[read] ** 2 if within == "l2" else scores[read]
    joined = WITHIN["sum" if within == "l2" else within](labels[read], values, size)
    present = np.bincount(labels[read], minlength=size) > 0
    return np.where(present, np.arange(size), NONE), np.sqrt(joined) if within == "l2" else joined


def _wanda(consumer: Consumer, found: Statistics) -> Tensor:
    return _like(found.of(consumer, Weights("absolute")).value, found.of(consumer, Norms()).norm)


def _fluctuation(consumer: Consumer, found: Statistics) -> Tensor:
    variance: Tensor = found.of(consumer, Moments()).variance
    return variance


def _weighed_fluctuation(consumer: Consumer, found: Statistics) -> Tensor:
    return _like(found.of(consumer, Weights("square")).value, found.of(consumer, Moments()).variance)


def _sample_means(consumer: Consumer, found: Statistics) -> Tensor:
    value: Tensor = found.of(consumer, SampleMeans()).value
    return value


def _norm(consumer: Consumer, found: Statistics) -> Tensor:
    norm: Tensor = found.of(consumer, Norms()).norm
    return norm


def _relative(consumer: Consumer, found: Statistics) -> Tensor:
    return _like(found.of(consumer, WeightShares()).value, found.of(consumer, Norms()).norm.sqrt())


def _like(weights: Tensor, activations: Tensor) -> Tensor:
    return weights.to(activations) * activations


CRITERIA: dict[str, Criterion] = {
    "wanda-sp": Criterion(
        (Norms(), Weights("absolute")), by_channel(_wanda), "Wanda-sp (FLAP's authors); METHODS.md 2.3"
    ),
    "flap": Criterion(
        (Moments(), Weights("square")),
        by_channel(_weighed_fluctuation, "mean", "gaussian"),
        "FLAP, z-scores of weighted variances, a head's mean: compare across axes; 2.2",
    ),
    "ifv": Criterion((Moments(),), by_channel(_fluctuation), "FLAP, input feature variance; 2.2"),
    "wifv": Criterion((Moments(), Weights("square")), by_channel(_weighed_fluctuation), "FLAP, weighted variance; 2.2"),
    "wifn": Criterion((Norms(), Weights("absolute")), by_channel(_wanda), "FLAP, weighted norm; 2.2"),
    "minitron": Criterion((SampleMeans(),), by_channel(_sample_means, "l2"), "Compact LMs; 2.9"),
    "activation": Criterion((Norms(),), by_channel(_norm), "what works in CFSP's fine score; 2.12"),
    "amp": Criterion((Contributions(),), amp, "AMP; 2.28"),
    "bonsai": Criterion(
        (Norms(), Weights("absolute")), by_channel(_wanda, "mean"), "Bonsai's prior, Wanda-sp with means; 2.15"
    ),
    "ria": Criterion((Norms(), WeightShares()), by_channel(_relative), "RIA, share of its row and of its column; 2.18"),
}
"""Criteria by name; sections are METHODS.md's."""


@dataclass(frozen=True)
class Activation:
    """Scores by what comes into the consumers of every axis, gathered in one forward pass over the batches.

    An axis that no operator with two operands sums over has no such scores: it goes last, by the size of its weights.

    Args:
        data: batches (tensors, tuples of arguments or dicts of keyword arguments), or `Statistics` that were collected.
        criterion: a name of `CRITERIA`, or a `Criterion`.
        reduction: over the consumers of an axis: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        gathering: precision of the sums, what is zeroed meanwhile, a bar on stderr.

    Raises, when called:
        DataError: there are no batches, or one doesn't fit the model.
        ScoreError: NaN or infinity comes into a consumer, which is named; an unknown name, at once.
    """

    comparable: ClassVar[bool] = False

    data: Iterable[Any] | Statistics
    criterion: str | Criterion = "wanda-sp"
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    gathering: Gathering = field(default_factory=Gathering)

    def __post_init__(self) -> None:
        if not isinstance(self.data, Statistics):
            check_batches(self.data)
        self.rule  # noqa: B018 (an unknown name is refused at once)
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    @property
    def rule(self) -> Criterion:
        """The criterion itself."""
        return self.criterion if isinstance(self.criterion, Criterion) else pick(CRITERIA, self.criterion, "criterion")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that `importance.collect` must gather for it."""
        return self.rule.needs

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        found = statistics_of(graph, self.data, self.needs, self.gathering)
        read = [axis for axis in graph.axes if found.readers(axis.name)]
        return with_unread(graph, {axis.name: self.of_axis(axis, found) for axis in read})

    def of_axis(self, axis: Axis, found: Statistics) -> np.ndarray:
        """The scores of one axis [groups], from what was found of the consumers that read it."""
        members = [self.rule.rule(consumer, found, axis.name) for consumer in found.readers(axis.name)]
        normalisation = Normalisation.of(self.normalise)
        return normalisation(Reduction.of(self.reduction)(members, axis.size))


def statistics_of(
    graph: DependencyGraph, data: Iterable[Any] | Statistics, needs: Iterable[Statistic], how: Gathering
) -> Statistics:
    """Statistics that were collected for this graph, or are now."""
    return data if isinstance(data, Statistics) else collect(graph, data, needs, how)


def with_unread(graph: DependencyGraph, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`scores`, and for axes without any such that are above all of these, in the order of their weights' size."""
    if len(scores) == len(graph.axes):
        return scores
    top = max((float(s.max()) for s in scores.values() if s.size), default=0.0)
    sizes = Magnitude()(graph)
    apart = max(abs(top), 1.0)
    return {axis.name: scores.get(axis.name, top + apart * (1 + sizes[axis.name])) for axis in graph.axes}
