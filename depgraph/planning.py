"""Choosing which groups go: scores in order, spread over axes, down to the budget.

Within an axis the lowest scores go first, so a choice is a number of groups for each axis. A *ranking* is one list of
(axis, how many more) in the order in which they go; the shortest beginning of it that meets the target is found by
bisection on exact costs, with rounding and ties settled at every step.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from depgraph.axes import Axis
from depgraph.coupling import NONE
from depgraph.cutting.settling import Settler, config_bound, inexpressible
from depgraph.errors import NothingToPrune, PlanError, TargetError
from depgraph.plan import Plan
from depgraph.report import uncovered
from depgraph.scoring import Scorer, Scores, checked_scores
from depgraph.target import Target

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Pattern = str | Axis | Callable[[Axis], bool]
Counts = dict[str, int]
Item = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Options:
    """How the budget is spread.

    scope: "global" (one ranking of all groups), "axis" (the same share of every axis), "uniform" (the same number of
        groups in all axes of one kind, so that all layers keep equal widths; attention's query-key width, which code
        computes scales and rotary tables from when it is built, stays whole); "auto" is "axis" for a scorer whose
        attribute `comparable` is False, else "global".
    rank: "score", or "density" (score per cost, for scores that add up, such as Taylor's); "auto" asks the scorer.
    round_to: keep a multiple of this many groups of every axis that has more groups than that.
    floor: the least share of every axis that stays (one group always does).
    protect, only: axes to leave whole, and the only ones to touch: name patterns, axes or callables.
    form: "module" also leaves whole what the module's Python can't express; "auto" and "graph" don't.
    """

    scope: str = "auto"
    rank: str = "auto"
    round_to: int = 1
    floor: float = 0.0
    protect: tuple[Pattern, ...] = ()
    only: tuple[Pattern, ...] = ()
    form: str = "auto"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options from keywords; raises PlanError for an unknown one or a value out of range."""
        known = {f.name for f in fields(cls)}
        for name in given:
            if name not in known:
                raise PlanError(f"plan has no option {name!r}; it takes {', '.join(sorted(known))}")
        listed = {n: _listed(given[n]) for n in ("protect", "only") if n in given}
        options = cls(**{**given, **listed})
        for name, allowed in {
            "scope": ("auto", *_RANKINGS),
            "rank": ("auto", "score", "density"),
            "form": FORMS,
        }.items():
            if getattr(options, name) not in allowed:
                raise PlanError(f"plan option {name}={getattr(options, name)!r} is not one of {', '.join(allowed)}")
        if not isinstance(options.round_to, int) or options.round_to < 1:
            raise PlanError(f"plan option round_to={options.round_to!r} must be a whole number of groups, 1 or more")
        if not 0 <= options.floor <= 1:
            raise PlanError(f"plan option floor={options.floor!r} must be a share between 0 and 1")
        return options


FORMS = ("auto", "module", "graph")


def _listed(given: Any) -> tuple[Pattern, ...]:
    if isinstance(given, (str, Axis)) or callable(given):
        return (given,)
    return tuple(given)


def matches(axis: Axis, patterns: Iterable[Pattern]) -> bool:
    """Does any pattern name the axis, one of its members (shell wildcards), or answer True to it?"""
    for pattern in patterns:
        if isinstance(pattern, Axis):
            if pattern.name == axis.name:
                return True
        elif isinstance(pattern, str):
            names = (axis.name, *(m.target for m in axis.members))
            if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names):
                return True
        elif pattern(axis):
            return True
    return False


def make_plan(graph: DependencyGraph, scorer: Scorer | Scores, target: Target, **given: Any) -> Plan:
    """Choose groups by `scorer` until `target` is met, within the cost of one group (or of one tied set of them).

    Raises:
        NothingToPrune: no axis may lose a group.
        TargetError: the floors and protections don't let the model become that small.
        ScoreError: the scores don't fit the axes or aren't finite.
        PlanError: an option is unknown or out of range.
    """
    options = Options.of(given)
    if not isinstance(target, Target):
        raise TargetError(f"expected a Target such as depgraph.Target(params=0.7), got {target!r}")
    if not any(axis.prunable.any() for axis in graph.axes):
        raise NothingToPrune(_nothing(graph))
    if options.scope == "auto":
        options = replace(options, scope="global" if getattr(scorer, "comparable", True) else "axis")
    choice = _Choice(graph, checked_scores(graph, scorer), target, options)
    if options.rank == "auto" and getattr(scorer, "additive", False) or options.rank == "density":
        choice.weigh()
    return choice.plan()


def _nothing(graph: DependencyGraph) -> str:
    stay = [axis.why_fixed for axis in graph.axes if axis.reasons] or [dim.reason for dim in uncovered(graph)]
    why = f"each is fixed, the first because of {stay[0]}" if stay else "it has no parameters"
    return f"{type(graph.model).__name__} has no axis that could lose a group: {why}"


def _never_empty(graph: DependencyGraph, scores: dict[str, np.ndarray], names: list[str]) -> dict[str, set[int]]:
    """Groups that stay so that no dim of a parameter loses all its indices to several axes together, by axis.

    Of each dim that the axes `names` could empty, one index stays: that whose lowest place in the order of any is highest.
    """
    place = {n: np.argsort(np.argsort(scores[n], kind="stable")) / graph[n].size for n in names}
    held = [v for v in graph.capture.program.values.values() if v.kind in ("parameter", "buffer")]
    stays: dict[str, set[int]] = {}
    for number in dict.fromkeys(graph.widths.class_of(dim) for value in held for dim in value.dims):
        axes = [graph[n] for n in graph.widths.reaching.get(number, ()) if n in place]
        labels = [axis.labels[number] for axis in axes]
        goes = [(found != NONE) & axis.prunable[found] for axis, found in zip(axes, labels, strict=True)]
        if not axes or not np.logical_or.reduce(goes).all():
            continue
        worth = np.min([np.where(g, place[a.name][x], 1.0) for a, x, g in zip(axes, labels, goes, strict=True)], axis=0)
        best = int(np.argmax(worth))
        for axis, found, going in zip(axes, labels, goes, strict=True):
            if going[best] and (len(axes) > 1 or len(np.unique(found)) < axis.size):
                stays.setdefault(axis.name, set()).add(int(found[best]))
    return stays


class _Choice:
    """The order in which each axis loses its groups, and the search for how many of each go."""

    def __init__(self, graph: DependencyGraph, scores: dict[str, np.ndarray], target: Target, options: Options) -> None:
        self.graph = graph
        self.target = target
        self.options = options
        self.rank_scores = scores
        self.order: dict[str, np.ndarray] = {}
        self.cap: Counts = {}
        self.leading: list[str] = []
        pinned = inexpressible(graph) if options.form == "module" else frozenset()
        if options.scope == "uniform":
            pinned |= config_bound(graph)
        open_axes = [a for a in graph.axes if a.name not in pinned and not matches(a, options.protect)]
        stays = _never_empty(graph, scores, [a.name for a in open_axes if a.prunable.any()])
        for axis in open_axes:
            self._order(axis, scores, stays.get(axis.name, set()))
            if axis.name in self.order and (not options.only or matches(axis, options.only)):
                self.leading.append(axis.name)
        if not self.leading:
            raise NothingToPrune("protect, only and floor together leave no group that may go")
        bends = options.form == "module" or options.scope == "uniform"
        bold = frozenset() if bends else frozenset(self.leading)
        self.settler = Settler(graph.sizes, self.order, self.cap, bold)

    def _order(self, axis: Axis, scores: dict[str, np.ndarray], stays: set[int]) -> None:
        """The groups of an axis that may go, lowest score first, and how many of them at the most."""
        free = np.setdiff1d(np.flatnonzero(axis.prunable), list(stays))
        stay = max(1, math.ceil(self.options.floor * axis.size - 1e-9))
        cap = self._rounded(axis, min(len(free), axis.size - stay))
        if cap > 0:
            self.order[axis.name] = free[np.argsort(scores[axis.name][free], kind="stable")]
            self.cap[axis.name] = cap

    def weigh(self) -> None:
        """Divide scores by what a group costs, so that the cheapest loss per parameter goes first."""
        dense = getattr(self.graph.dense_cost, self.target.metric)
        weighed = {}
        for name, order in self.order.items():
            cost = dense - getattr(self.graph.cost({name: order[:1]}), self.target.metric)
            weighed[name] = self.rank_scores[name] / max(cost, 1)
        self.rank_scores = weighed

    def plan(self) -> Plan:
        ranking = _RANKINGS[self.options.scope](self)
        if not self._meets(ranking, len(ranking)):
            lowest = self.graph.cost(self._removal(self._counts(ranking, len(ranking))))
            shares = lowest.share_of(self.graph.dense_cost)
            least = ", ".join(f"{m}={shares[m]:.3f}" for m in self.target.shares)
            raise TargetError(
                f"a target of {self.target} can't be met: floors, protections and ties allow {least} at the least"
            )
        low, high = 0, len(ranking)
        while low < high:
            middle = (low + high) // 2
            if self._meets(ranking, middle):
                high = middle
            else:
                low = middle + 1
        return Plan.of(self.graph, self._removal(self._trimmed(ranking[:low], self._counts(ranking, low))))

    def _trimmed(self, gone: list[Item], counts: Counts) -> Counts:
        """Settling makes costs jump: what went beyond the target comes back, the last to go first, until nothing can."""
        if not gone:
            return counts
        items = list(dict.fromkeys(reversed(gone)))
        metric, dense = self.target.metric, getattr(self.graph.dense_cost, self.target.metric)
        one_group = dense - self._spent({name: 1 for name, _ in items[0]})
        if self.target.shares[metric] * dense - self._spent(counts) <= one_group:
            return counts
        before: Counts = {}
        while counts != before:
            before = counts
            for item in items:
                counts = self._put_back(item, counts)
        return counts

    def _put_back(self, item: Item, counts: Counts) -> Counts:
        """`counts` with one more group of each axis of `item` kept, if the target is still met with less slack."""
        if not all(counts.get(name) for name, _ in item):
            return counts
        fewer = {name: self._rounded(self.graph[name], counts[name] - more) for name, more in item}
        trial = {**counts, **fewer}
        if not self._met_by(trial):
            return counts
        if self.options.form == "module" or (self.options.form == "auto" and not self.settler.broken(counts)):
            trial = self.settler.settle(trial)
        dearer = self._spent(trial) > self._spent(counts)
        return trial if dearer and self._met_by(trial) else counts

    def _spent(self, counts: Counts) -> int:
        return int(getattr(self.graph.cost(self._removal(counts)), self.target.metric))

    def _met_by(self, counts: Counts) -> bool:
        return self.target.met_by(self.graph.cost(self._removal(counts)), self.graph.dense_cost)

    def _meets(self, ranking: list[Item], length: int) -> bool:
        return self._met_by(self._counts(ranking, length))

    def _counts(self, ranking: list[Item], length: int) -> Counts:
        counts: Counts = {}
        for item in ranking[:length]:
            for name, more in item:
                counts[name] = counts.get(name, 0) + more
        for name in counts:
            counts[name] = self._rounded(self.graph[name], min(counts[name], self.cap[name]))
        if self.options.form == "graph":
            return counts
        return self.settler.settle(counts)

    def _rounded(self, axis: Axis, count: int) -> int:
        """The largest number up to `count` that leaves a multiple of `round_to`."""
        step = self.options.round_to
        if step == 1 or axis.size <= step:
            return count
        stay = math.ceil((axis.size - count) / step) * step
        return max(axis.size - stay, 0)

    def _removal(self, counts: Counts) -> dict[str, np.ndarray]:
        return {name: self.order[name][:n] for name, n in counts.items() if n}


def _global_ranking(choice: _Choice) -> list[Item]:
    """All groups of all axes by score; ties by axis and then by position, so that the order is the same everywhere."""
    entries = []
    for k, name in enumerate(choice.leading):
        scores = choice.rank_scores[name][choice.order[name]]
        entries += [(float(scores[i]), k, i, name) for i in range(choice.cap[name])]
    return [((name, 1),) for _, _, _, name in sorted(entries)]


def _axis_ranking(choice: _Choice) -> list[Item]:
    """Axes take turns, so that all lose the same share."""
    entries = []
    for k, name in enumerate(choice.leading):
        size = choice.graph[name].size
        entries += [((i + 1) / size, k, name) for i in range(choice.cap[name])]
    return [((name, 1),) for _, _, name in sorted(entries)]


def _uniform_ranking(choice: _Choice) -> list[Item]:
    """Kinds of axes take turns; a kind loses one group of each of its axes at once."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for name in choice.leading:
        axis = choice.graph[name]
        kinds.setdefault((axis.kind, axis.size), []).append(name)
    entries = []
    for k, ((_, size), names) in enumerate(kinds.items()):
        cap = min(choice.cap[n] for n in names)
        entries += [((i + 1) / size, k, tuple((n, 1) for n in names)) for i in range(cap)]
    return [item for _, _, item in sorted(entries)]


_RANKINGS: dict[str, Callable[[_Choice], list[Item]]] = {
    "global": _global_ranking,
    "axis": _axis_ranking,
    "uniform": _uniform_ranking,
}
