"""Structured optimal brain surgeon: what it costs the consumers that a group goes, once they have made up for it.

Each consumer is a layer problem of its own, see `importance.problems`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from depgraph import Axis, DependencyGraph
from importance.accumulators import Gram, Statistic, Weights
from importance.activation import statistics_of, with_unread
from importance.calling import check_batches
from importance.collector import Gathering
from importance.inverses import Inverses
from importance.normalisation import Normalisation, NormalisationSpec
from importance.problems import check_greedy, greedy_losses
from importance.statistics import Statistics


@dataclass(frozen=True)
class OptimalBrain:
    """Scores by the loss of removing a group with the optimal update of all consumers that read it, summed over these.

    Losses are of the consumers' outputs, squared, for each position. Several groups of one axis are never as cheap together
    as one by one: with `rounds`, the cheapest share of every axis goes, its consumers' weights and H follow, and the rest is
    scored anew, so that a group's score is what it costs after all that go before it (greedy, as OBS is).

    Args:
        data: batches, or `Statistics` with `importance.Gram()` and `importance.Weights("square")`.
        damping: added to H's diagonal, as a share of its mean.
        rounds: 1 scores every group alone.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        gathering: precision of the sums, what is zeroed meanwhile, a bar on stderr.

    Raises, when called: DataError and ScoreError as `importance.collect` does; ScoreError for a singular H.
    """

    comparable: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    needs: ClassVar[tuple[Statistic, ...]] = (Gram(), Weights("square"))

    data: Iterable[Any] | Statistics
    damping: float = 0.01
    rounds: int = 1
    normalise: NormalisationSpec = "none"
    gathering: Gathering = field(default_factory=Gathering)

    def __post_init__(self) -> None:
        if not isinstance(self.data, Statistics):
            check_batches(self.data)
        check_greedy(self.damping, self.rounds)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        found = statistics_of(graph, self.data, self.needs, self.gathering)
        read = [axis for axis in graph.axes if found.readers(axis.name)]
        inverses = Inverses(found, self.damping, {axis.name for axis in read})
        return with_unread(graph, {axis.name: self._losses(axis, found, inverses) for axis in read})

    def of_axis(self, axis: Axis, found: Statistics) -> np.ndarray:
        """The scores of one axis [groups], from what was found of the consumers that read it."""
        return self._losses(axis, found, Inverses(found, self.damping, {axis.name}))

    def _losses(self, axis: Axis, found: Statistics, inverses: Inverses) -> np.ndarray:
        """What every group of an axis costs: float64 [groups]."""
        problems = [p for consumer in found.readers(axis.name) for p in inverses.problems(axis.name, consumer)]
        return Normalisation.of(self.normalise)(greedy_losses(problems, axis.size, self.rounds))
