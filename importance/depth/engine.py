"""The model without a set of branches and blocks, measured on calibration data, without running what can't have changed.

A run begins in front of the first operator that nothing has run for this set yet: the hidden states in front of every
candidate are kept, under what is left out before them, for whichever set comes next. That is exact, as is stopping a
candidate whose sum over some batches is already above another's over all, where no batch's measure is below 0. Operators that
draw random numbers draw the same in every run.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from depgraph import DependencyGraph
from depgraph.errors import DepgraphError, ScoreError, unfit_batch
from importance.calling import named_inputs
from importance.depth.batches import Given, given
from importance.depth.files import FilePart
from importance.depth.metrics import Distance, LossMetric, Measured, Metric
from importance.depth.programs import Cut, Names, Part, State
from importance.depth.states import States
from importance.losses import own_loss

Batches = Iterable[Any]


@dataclass(frozen=True)
class Effort:
    """What a search may use: `memory` for hidden states, in bytes, and the `share` of candidates that goes on after a batch.

    With a share below 1, only the best so far among the compared sets are run on the next batch, which isn't exact. Raises
    ScoreError for a number out of range.
    """

    memory: int = 1 << 30
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.memory < 0 or not 0 < self.share <= 1:
            raise ScoreError(f"memory must be 0 or more and share in (0, 1], they are {self.memory} and {self.share}")


NORMAL = Effort()


@dataclass(frozen=True)
class Best:
    """The best of several sets, and its value."""

    removed: Names
    value: float


class Engine:
    """Measures sets of `units`, which are names of branches or of blocks of a graph, on batches.

    `evaluations` counts layer evaluations: the units run, times batches. Without a `metric` it is the loss where the model
    has one, else the distance of outputs "norm".

    Raises DataError: no batches, or they don't fit. ScoreError: the metric can't be taken.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        batches: Batches,
        units: Sequence[str],
        metric: Metric | None = None,
        effort: Effort = NORMAL,
    ) -> None:
        self.graph, self.units, self.share = graph, tuple(units), effort.share
        self.order = {name: k for k, name in enumerate(self.units)}
        self.data = given(graph, batches, self.units)
        self.evaluations = 0
        self.states = States(effort.memory)
        self.measured: dict[tuple[Names, int], Measured] = {}
        self.parts: OrderedDict[tuple[int, Names], Part | FilePart] = OrderedDict()
        whole: Names = frozenset()
        self.dense = [self.output(whole, k) for k in range(len(self.data))]
        self.metric = metric or self._own_metric()

    def output(self, removed: Names, batch: int) -> Any:
        """What the model returns for a batch without the removed units, in its own form."""
        data = self.data[batch]
        part = self._part(data, removed)
        begin = self._begin(part, batch)
        place = begin[0].place if begin is not None else -1
        self.evaluations += sum(start >= place for name, start in data.way.starts.items() if name not in removed)

        def keep(cut: Cut, state: State) -> None:
            self.states.put((batch, cut.place, data.way.before(cut.place, removed)), state)

        try:
            return part.run(data.leaves, begin, keep)
        except DepgraphError:
            raise
        except (RuntimeError, LookupError, ValueError, TypeError) as error:
            raise unfit_batch(self.graph.model, error) from error

    def value(self, removed: Iterable[str]) -> float:
        """The measure of the model without the removed units, over all batches."""
        names = frozenset(removed)
        return _quotient([self._measure(names, k) for k in range(len(self.data))])

    def best(self, sets: Sequence[Names]) -> Best:
        """The set with the lowest value; the first of those that have it.

        Where measures are never below 0, that with the lowest sum so far is always run on its next batch: once it has all, it
        is the best, as sums only grow. Others are run in full.
        """
        if self.share < 1:
            sets = self._likely(sets)
        if not self.metric.nonnegative:
            values = [self.value(names) for names in sets]
            return Best(sets[values.index(min(values))], min(values))
        running = [(0.0, k, 0) for k in range(len(sets))]
        while True:
            total, k, done = heapq.heappop(running)
            if done == len(self.data):
                return Best(sets[k], self.value(sets[k]))
            found = self._measure(sets[k], done)
            heapq.heappush(running, (total + found.total, k, done + 1))

    def only_with(self, removed: Names) -> None:
        """Say that all sets to come have these units too, so that other hidden states can be let go."""
        before = {
            k: {place: data.way.before(place, removed) for place in data.way.places} for k, data in enumerate(self.data)
        }
        self.states.keep_only(removed, before)

    def _likely(self, sets: Sequence[Names]) -> Sequence[Names]:
        """Those that are left when after every batch but the last only the best share goes on; one at least."""
        totals = [0.0] * len(sets)
        left = list(range(len(sets)))
        for batch in range(len(self.data) - 1):
            for k in left:
                totals[k] += self._measure(sets[k], batch).total
            left = sorted(left, key=totals.__getitem__)[: math.ceil(self.share * len(left))]
        return [sets[k] for k in sorted(left)]

    def _measure(self, removed: Names, batch: int) -> Measured:
        key = removed, batch
        if key not in self.measured:
            output = self.output(removed, batch) if removed else self.dense[batch]
            found = self.metric(self.graph.model, output, self.data[batch].batch, self.dense[batch])
            self.measured[key] = self._checked(found, removed)
        return self.measured[key]

    def _checked(self, found: Measured, removed: Names) -> Measured:
        """A measure, infinite where it is no number; of the whole model it must be one."""
        if self.metric.nonnegative and found.total < 0:
            raise ScoreError(
                f"the metric is {found.total} for a batch, below 0, though it says it can't be: set its nonnegative=False"
            )
        if math.isfinite(found.total):
            return found
        if not removed:
            raise ScoreError(
                f"the metric of the whole model is {found.total} for a batch: look for NaN or infinite weights or inputs"
            )
        return Measured(math.inf, found.of)

    def _begin(self, part: Part | FilePart, batch: int) -> tuple[Cut, State] | None:
        """The last cut of which the state is held."""
        for cut in reversed(part.cuts):
            state = self.states.get((batch, cut.place, part.way.before(cut.place, part.removed)), cut.needs)
            if state is not None:
                return cut, state
        return None

    def _part(self, data: Given, removed: Names) -> Part | FilePart:
        key = id(data.way), removed
        if key not in self.parts:
            self.parts[key] = data.way.part(removed)
        self.parts.move_to_end(key)
        while len(self.parts) > data.way.held:
            self.parts.popitem(last=False)
        return self.parts[key]

    def _own_metric(self) -> Metric:
        try:
            own_loss(self.dense[0], named_inputs(self.graph.model, self.data[0].batch))
        except ScoreError:
            return Distance("norm")
        return LossMetric()


def _quotient(parts: Sequence[Measured]) -> float:
    return sum(p.total for p in parts) / sum(p.of for p in parts)
