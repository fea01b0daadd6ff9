"""The plain ways to spread a budget: equally, in one pool, by kind of axis, by cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from depgraph.patterns import Shares, unnamed
from depgraph.target import METRICS
from importance.allocations.allocated import Allocation, Arrays, at_levels, in_proportion, placed, scored
from importance.choices import pick


@dataclass(frozen=True)
class Global:
    """The scores as they are: one pool of all groups, whatever they cost.

    This is also LLM Surgeon's threshold (METHODS.md 2.14): one value of the loss, below which groups of all layers go. There
    the most that costs no more than the budget goes, here the least that meets it, which is one group more.
    """

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        return dict(scores)


@dataclass(frozen=True)
class Uniform:
    """Every axis loses the same share of its groups: the k-th lowest of them goes at the level k / size."""

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        return at_levels(graph, scores, lambda axis: in_proportion(1.0))


@dataclass(frozen=True)
class ByCost:
    """One pool of all groups, ranked by score per cost, so that what saves most for its score goes first.

    The cost of a group is what the graph says that the model costs less without it (the first of its axis that may go),
    in "params", "macs" or "bytes". `graph.plan(rank="density")` does the same for a scorer without an allocation.
    """

    metric: str = "params"

    def __post_init__(self) -> None:
        pick(dict.fromkeys(METRICS), self.metric, "measure of cost")

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        costs = group_costs(graph, self.metric)
        return {
            axis.name: placed(axis, order, given / costs[axis.name]) for axis, order, given in scored(graph, scores)
        }


@dataclass(frozen=True)
class PerKind:
    """Kinds of axes apart: each loses the same share of its groups, and within a kind `within` ranks them.

    A kind is what repeated layers call by one name (`Axis.kind`): all their neurons, all their heads. Of the groups of a
    kind, N of them in all, the k-th in the order of `within` goes at the level k / N, divided by the kind's pace.

    Args:
        within: `Global()` takes a kind's groups as one pool, `Uniform()` the same share of each of its axes.
        pace: by pattern (of axis or parameter names, as in `protect=`) how fast a kind goes compared with others: 0.5 loses
            half the share, 0 loses nothing before all others have lost everything. 1 where no pattern fits.

    Raises ScoreError: a pace is negative or no number; when called, a pattern fits no axis, or the axes of one kind
    differ in it.
    """

    within: Allocation = field(default_factory=Global)
    pace: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, pace in self.pace.items():
            if not isinstance(pace, Real) or isinstance(pace, bool) or not 0 <= pace < np.inf:
                raise ScoreError(f"the pace of {pattern!r} is {pace!r}: give a finite number, 0 or more")

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        paces = self._paces(graph)
        kinds = defaultdict(list)
        for entry in scored(graph, self.within(graph, scores)):
            kinds[entry[0].kind].append(entry)
        found, last = {}, 1 / min([pace for pace in paces.values() if pace], default=1.0)
        for kind, alike in kinds.items():
            pace = paces[kind]
            shares = _ranks([given for _, _, given in alike]) / sum(axis.size for axis, _, _ in alike)
            levels = shares / pace if pace else last + 1 + shares
            ends = np.cumsum([len(order) for _, order, _ in alike])[:-1]
            for (axis, order, _), values in zip(alike, np.split(levels, ends), strict=True):
                found[axis.name] = placed(axis, order, values)
        return found

    def _paces(self, graph: DependencyGraph) -> dict[str, float]:
        for name in unnamed(graph, self.pace):
            raise ScoreError(f"a pace is given for {name!r}, which names no axis and no parameter of one")
        found: dict[str, float] = {}
        given = Shares(self.pace)
        for axis in graph.axes:
            mine = next((float(pace) for pace in given.of(axis)), 1.0)
            if found.setdefault(axis.kind, mine) != mine:
                raise ScoreError(
                    f"axes of the kind {axis.kind!r} have different paces: give patterns that take all of a kind"
                )
        return found


def _ranks(parts: list[np.ndarray]) -> np.ndarray:
    """The places, counted from 1, of all values of some arrays among all of them; equal ones in the order given."""
    values = np.concatenate(parts)
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values)) + 1
    return ranks


def group_costs(graph: DependencyGraph, metric: str = "params") -> dict[str, float]:
    """What one group of every axis costs, the first that may go: at least 1. Axes that may lose none are left out."""
    dense = getattr(graph.dense_cost, metric)
    firsts = {axis.name: np.flatnonzero(axis.prunable)[:1] for axis in graph.axes if axis.prunable.any()}
    return {name: float(max(dense - getattr(graph.cost({name: g}), metric), 1)) for name, g in firsts.items()}
