"""Structured optimal brain surgeon: what it costs the consumers that a group goes, once they have made up for it.

Each consumer is a layer problem of its own, see `importance.problems`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from depgraph import Axis, DependencyGraph
from importance.accumulators import Gram, Statistic, Weights
from importance.activation import statistics_of, with_unread
from importance.calling import check_batches
from importance.collector import Gathering
from importance.columns import Block, blocks_of, column_labels, weight_of
from importance.consumers import Consumer
from importance.normalisation import Normalisation, NormalisationSpec
from importance.problems import Solvable, check_greedy, greedy_losses, problems_of
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
        return with_unread(graph, {axis.name: self.of_axis(axis, found) for axis in read})

    def of_axis(self, axis: Axis, found: Statistics) -> np.ndarray:
        """The scores of one axis [groups], from what was found of the consumers that read it."""
        return Normalisation.of(self.normalise)(self._losses(axis.name, axis.size, found))

    def _losses(self, name: str, size: int, found: Statistics) -> np.ndarray:
        """What every group of an axis costs: float64 [groups]."""
        problems = [p for consumer in found.readers(name) for p in self._problems(name, consumer, found)]
        return greedy_losses(problems, size, self.rounds)

    def _problems(self, axis: str, consumer: Consumer, found: Statistics) -> Iterator[Solvable]:
        sums = found.of(consumer, Gram())
        columns = sums.columns
        labels = column_labels(consumer, axis, columns)
        weight = weight_of(consumer, found)
        if weight is None:  # what is multiplied with is computed: only the sizes of its columns are known
            each = columns // consumer.size
            sizes = (found.of(consumer, Weights("square")).value.double().cpu() / each).sqrt().repeat_interleave(each)
            blocks = [Block(sizes[None], 0)]
        else:
            blocks = [*blocks_of(consumer, weight, columns)]
        for block in blocks:
            yield from problems_of(sums, block, labels[block.start : block.stop], self.damping, consumer)
