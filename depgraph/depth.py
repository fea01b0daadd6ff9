"""Choosing which blocks and branches are left out: in the order of their scores, or as a search finds them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, cast

from depgraph.budget import LATENCY, Budget, Spent
from depgraph.errors import ScoreError, TargetError
from depgraph.remaining import why_not
from depgraph.scoring import Depth, DepthSearch, checked_depth, is_search
from depgraph.target import Target

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Names = tuple[str, ...]


def chosen(graph: DependencyGraph, depth: Depth, target: Target, base: Names = ()) -> Names:
    """The blocks and branches that are left out, beside those of `base`, so that the target is met: as few as may be.

    Raises:
        TargetError: so many can't go, or all that may go don't make the model that small.
        ScoreError: scores aren't numbers of what can be left out, or there is nothing.
    """
    if is_search(depth):
        return _Searched(graph, cast(DepthSearch, depth), target, base).chosen()
    ranking = ranked(graph, checked_depth(graph, depth), base)
    return _shortest(graph, ranking, target, base)


def ranked(graph: DependencyGraph, scores: dict[str, float], base: Names = ()) -> Names:
    """Blocks and branches that can go together, the lowest score first; of equal ones the first in order of execution."""
    places = {node.name: k for k, node in enumerate(graph.residual.flow.nodes)}
    ends = {b.name: places[b.add] for b in graph.branches} | {b.name: places[b.output] for b in graph.blocks}
    found = list(base)
    for name in sorted(scores, key=lambda name: (scores[name], ends[name])):
        if name not in found and not why_not(graph, [*found, name]):
            found.append(name)
    return tuple(found[len(base) :])


def is_met(graph: DependencyGraph, names: Sequence[str], target: Target) -> bool:
    """Are the limits of the target met once these are left out?"""
    fast = target.latency_ms is None or spent(graph, names, target)[LATENCY] <= target.latency_ms
    return fast and target.met_by(graph.cost(branches=names), graph.dense_cost)


def spent(graph: DependencyGraph, names: Sequence[str], target: Target) -> Spent:
    """What the model spends without some blocks and branches, by measure of the target; milliseconds first."""
    cost, found = graph.cost(branches=names), Spent()
    if target.latency is not None:
        found[LATENCY] = float(target.latency.ms(graph.widths.at({}).without(names)))
    limited = (*target.shares, *(("bytes",) if target.most_bytes is not None else ()))
    return found | {metric: float(getattr(cost, metric)) for metric in limited}


def most(graph: DependencyGraph, target: Target) -> Spent:
    """What the model may spend, by measure of a target."""
    found = {metric: share * getattr(graph.dense_cost, metric) for metric, share in target.shares.items()}
    if target.most_bytes is not None:
        found["bytes"] = float(target.most_bytes)
    return found if target.latency_ms is None else {LATENCY: target.latency_ms, **found}


def _shortest(graph: DependencyGraph, ranking: Names, target: Target, base: Names) -> Names:
    """The shortest beginning of a ranking that meets the target, without what it is met without."""
    least = int(target.left_out or 0)
    if least > len(ranking) or not is_met(graph, (*base, *ranking), target):
        raise _refusal(graph, target, (*base, *ranking), len(ranking))
    length = bisect_left(range(least, len(ranking)), True, key=lambda n: is_met(graph, (*base, *ranking[:n]), target))
    found = list(ranking[: least + length])
    for name in reversed(found[:-1] if target.left_out is None else []):
        fewer = [other for other in found if other != name]
        found = fewer if is_met(graph, (*base, *fewer), target) else found
    return tuple(found)


def _refusal(graph: DependencyGraph, target: Target, names: Names, number: int) -> TargetError:
    above = _above(graph, target, names)
    if target.left_out is not None and target.left_out > number:
        return TargetError(
            f"{target.left_out} blocks or branches of {graph.name} can't be left out: {number} of those with scores can go together",
            above,
        )
    budget = Budget(graph, target, names)
    unmet = budget.unmet(graph.widths.at({}), f"without all {number} blocks or branches that may go it is")
    return TargetError(unmet.sentence(target, graph.dense_cost), above, unmet)


def _above(graph: DependencyGraph, target: Target, names: Names) -> float:
    """How many times its limit what is spent without these is, by the measure that is farthest above."""
    left, limits = spent(graph, names, target), most(graph, target)
    return max((left[measure] / limit for measure, limit in limits.items() if limit > 0), default=math.inf)


class _Searched:
    """What a search finds for the smallest number with which the target is met."""

    def __init__(self, graph: DependencyGraph, search: DepthSearch, target: Target, base: Names) -> None:
        self.graph, self.search, self.target, self.base = graph, search, target, base
        self.nested = bool(getattr(search, "nested", False))
        self.name = getattr(search, "name", type(search).__name__)

    def chosen(self) -> Names:
        """The names that go."""
        if self.target.left_out is not None:
            return self._found(int(self.target.left_out))
        first, parts = self._found(1), [b.name for b in self.graph.blocks]
        parts = parts if first[0] in parts else [b.name for b in self.graph.branches]
        failure: Exception | None = None
        for count in self._counts(parts):
            try:
                names = self._found(count)
            except (ScoreError, TargetError) as error:
                failure = error
                continue
            met = [n for n in self._lengths(count) if is_met(self.graph, (*self.base, *names[:n]), self.target)]
            if met:
                return names[: met[0]]
        raise TargetError(
            f"a target of {self.target} can't be met by leaving out what {self.name} finds"
            + (f": {failure}" if failure else "")
        )

    def _counts(self, parts: list[str]) -> Iterator[int]:
        """How many to search for: at once as many as surely do where the order for fewer is the beginning of that, then one more each."""
        least, enough = self._enough(parts, dearest=True), self._enough(parts, dearest=False)
        if self.nested and least < enough:
            yield enough
        yield from range(least, len(parts) + 1)

    def _lengths(self, count: int) -> range:
        return range(1, count + 1) if self.nested else range(count, count + 1)

    def _enough(self, parts: list[str], *, dearest: bool) -> int:
        """As many as must go if they are the dearest, or the cheapest."""
        now, limits, whole = (
            spent(self.graph, self.base, self.target),
            most(self.graph, self.target),
            spent(self.graph, (), self.target),
        )
        without = [spent(self.graph, [part], self.target) for part in parts]
        each = {m: sorted((whole[m] - one[m] for one in without), reverse=dearest) for m in limits}
        over = {m: now[m] - limit if m == LATENCY else math.ceil(now[m] - limit) for m, limit in limits.items()}
        needed = max(bisect_left(list(accumulate(each[m])), over[m]) for m in over)
        return 1 + min(needed, len(parts) - 1)

    def _found(self, count: int) -> Names:
        names = tuple(self.search(self.graph, count).names)
        why = why_not(self.graph, (*self.base, *names))
        if why:
            raise TargetError(f"{self.name} found what can't go together: {why}")
        return names
