"""Choosing which groups go: scores in order, spread over axes, down to the budget.

Within an axis the lowest scores go first, so a choice is a number of groups for each axis. A *ranking* is one list of
axes (of one, or of several at once), each of which loses one more group, in the order in which they do; the beginning of it
that just meets the target is found on exact costs, with rounding and ties settled at every step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from depgraph.axes import Axis
from depgraph.budget import LATENCY, Budget
from depgraph.configs import of_library
from depgraph.configured import Freedom, configured_plan
from depgraph.crossing import crossing
from depgraph.customs import customs_that_hold
from depgraph.cutting.absorbing import why_beyond
from depgraph.cutting.expressible import is_expressible
from depgraph.cutting.settling import Settler, config_bound, inexpressible
from depgraph.errors import NothingToPrune
from depgraph.options import Options
from depgraph.patterns import Matcher
from depgraph.plan import Plan
from depgraph.rankings import RANKINGS, Item, Ranking
from depgraph.remaining import never_empty
from depgraph.rounding import Rounding
from depgraph.stairs import stops
from depgraph.target import Target
from depgraph.trimming import Trimming
from depgraph.unmet import Unmet
from depgraph.wording import axis_and_more

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.widths import Kept

Counts = dict[str, int]
_MOST_STOPS, _PROBES = 256, 12  # sizes of one axis that are looked at, and those that tell whether it is as another is
_ALIKE, _TINY = 0.01, 1e-12


@dataclass(frozen=True)
class Attempt:
    """One way to treat sizes that the module's Python ties to one another.

    settle: bend the numbers so that ties hold; bold: leave a tie broken that only giving back all of an axis would mend;
    pin: leave whole what the module's Python can't express alone, and what is in `barred`; express: take only what it can
    express in the end; most: how many groups some axes may lose at the most.
    """

    settle: bool = True
    bold: bool = False
    pin: bool = False
    express: bool = False
    barred: frozenset[str] = frozenset()
    most: Mapping[str, int] = field(default_factory=dict)


def _nothing_left(options: Options, pinned: bool) -> str:
    """The sentence for options that leave nothing to choose from."""
    given = [name for name in ("protect", "only", "floor") if getattr(options, name)]
    given += ["round_to"] if options.round_to != 1 else []
    given += ["what the module's Python can't express"] if pinned else []
    held = f"{' and '.join(given)} together leave" if len(given) > 1 else f"{''.join(given) or 'what must stay'} leaves"
    return f"{held} no group that may go"


class Choice:
    """The order in which each axis loses its groups, and the search for how many of each go."""

    def __init__(
        self,
        graph: DependencyGraph,
        scores: dict[str, np.ndarray],
        target: Target,
        options: Options,
        attempt: Attempt,
    ) -> None:
        self.graph = graph
        self.target = target
        self.budget = Budget(graph, target, options.branches)
        self.options = options
        self.rounding = Rounding(graph, options.round_to)
        self.attempt = attempt
        self.scores = self.rank_scores = scores
        self.ways = [scores]
        self.order: dict[str, np.ndarray] = {}
        self.cap: Counts = {}
        self.leading: list[str] = []
        self.stops: dict[str, list[int]] = {}
        self._all: Kept | None = None
        self._open(self._pinned())
        if LATENCY in self.budget.limits:
            self._find_stops()
        self.share = 0.0  # of its groups, on average, that an axis of the plan loses before coarse axes are made up for
        self.settler: Settler | None = None
        if attempt.settle:
            bold = frozenset(self.leading) if attempt.bold else frozenset()
            steps = {n: step for n in self.order if 1 < (step := self.rounding.step(n)) <= graph[n].size}
            self.settler = Settler(graph.sizes, self.order, self.cap, bold, steps)

    def _pinned(self) -> frozenset[str]:
        """The axes that can't lose groups in the form that is asked for."""
        graph, options, attempt = self.graph, self.options, self.attempt
        pinned = attempt.barred | (inexpressible(graph) if attempt.pin and options.form == "module" else frozenset())
        if options.scope == "uniform" and graph.form != "graph":
            pinned = attempt.barred if of_library(graph.model) else pinned | config_bound(graph)
        if options.form == "graph":  # whole modules leave a list of the module
            pinned |= {a.name for a in graph.axes if a.tried}
        return pinned

    def _open(self, pinned: frozenset[str]) -> None:
        """Find the order of the axes that may lose groups, and those that lead; raises NothingToPrune where none does."""
        protected, asked = Matcher(self.options.protect), Matcher(self.options.only)
        axes = [a for a in self.graph.axes if a.name not in pinned and not protected(a)]
        stays = never_empty(self.graph, self.scores, [a.name for a in axes if a.prunable.any()])
        for axis in axes:
            self._order(axis, stays.get(axis.name, set()))
            wanted = not self.options.only or asked(axis)
            if axis.name in self.order and wanted and self._saves(axis.name):
                self.leading.append(axis.name)
        if not self.leading:
            raise NothingToPrune(_nothing_left(self.options, bool(pinned)))

    def _order(self, axis: Axis, stays: set[int]) -> None:
        """The groups of an axis that may go, lowest score first, and how many of them at the most."""
        free = np.setdiff1d(np.flatnonzero(axis.prunable), list(stays))
        least = self.graph.widths.least(axis.name)
        stay = max(least, math.ceil(self.options.floor_of(axis) * axis.size - 1e-9))
        limit = min(len(free), axis.size - stay, self.attempt.most.get(axis.name, axis.size))
        cap = min(limit, self.rounded(axis, limit))
        if cap > 0:
            self.order[axis.name] = free[np.argsort(self.scores[axis.name][free], kind="stable")]
            self.cap[axis.name] = cap

    def _saves(self, name: str) -> bool:
        """Does an axis lie in what stays, if some branches are left out?"""
        return not self.options.branches or self.budget.gain(
            self.budget.spent({name: self.order[name][: self.cap[name]]})
        ) > self.budget.gain(self.budget.spent({}))

    def _find_stops(self) -> None:
        """At which numbers of removed groups each axis may stop, where time falls in steps; all, where it doesn't.

        An axis whose removal saves nothing that the target limits isn't led by: it is narrowed only where others need it.
        Axes alike in kind and size, as of repeated layers, share their stops where a few sizes save alike.
        """
        known: dict[tuple[str, int, int], tuple[np.ndarray, list[int]]] = {}
        for name in self.leading:
            axis, cap = self.graph[name], self.cap[name]
            counts = [n for n in range(1, cap + 1) if self.rounded(axis, n) == n]
            every = 1 << max(0, (len(counts) - 1) // _MOST_STOPS).bit_length()
            looked_at = [n for n in counts if (axis.size - n) % every == 0] or counts
            few = np.array([self._gain(name, n) for n in looked_at[:: max(1, len(looked_at) // _PROBES)]])
            few = few / max(few.max(), _TINY)
            as_before = known.get((axis.kind, axis.size, cap))
            if as_before is not None and np.allclose(as_before[0], few, atol=_ALIKE):
                found = as_before[1]
            else:
                found = stops(partial(self._gain, name), looked_at)
                known[axis.kind, axis.size, cap] = few, found
            if found != looked_at:
                self.stops[name] = found
        self.leading = [name for name in self.leading if self.stops.get(name, [1])]
        if not self.leading:
            raise NothingToPrune("no axis that may lose groups takes any time by the latency model: look at its parts")

    def _gain(self, name: str, count: int) -> float:
        """What an axis saves, as a share of the dense model, when its first groups go alone."""
        return self.budget.gain(self.budget.spent({name: self.order[name][:count]}))

    def first(self, names: Iterable[str]) -> Counts:
        """The smallest step of some axes."""
        return {name: self.stops[name][0] if self.stops.get(name) else 1 for name in names}

    def weigh(self) -> None:
        """Divide scores by what a group costs, so that the cheapest loss goes first, by each measure that is limited in turn.

        Which limit binds isn't known before: a plan by milliseconds may spend its bytes on what loses much.
        """
        if self.options.scope != "global":  # other rankings don't ask
            return
        steps = {name: self.first([name]) for name in self.order}
        after = {name: self.budget.spent(self._removal(step)) for name, step in steps.items()}
        dense = self.budget.spent({})
        self.ways = [
            {
                name: self.scores[name] / max((dense[m] - spent[m]) / steps[name][name], self.budget.least(m))
                for name, spent in after.items()
            }
            for m in self.budget.limits
        ]

    def plan(self) -> Plan | None:
        """The plan that meets the target; None where there is none, or it can't be expressed though that was asked.

        Of those by several ways to rank, the one whose groups have the lowest scores.
        """
        if self.options.scope == "uniform" and of_library(self.graph.model):
            freedom = Freedom(self.order, self.cap, self.leading, self.rounding, self.options.branches)
            return configured_plan(self.graph, freedom, self.target)
        found = [one for way in self.ways if (one := self._plan_by(way)) is not None]
        if not found:
            return None
        plan, self.share = min(found, key=self._lost)
        return plan

    def _lost(self, found: tuple[Plan, float]) -> float:
        return sum(float(self.scores[name][list(groups)].sum()) for name, groups in found[0].removal.items())

    def _plan_by(self, rank_scores: dict[str, np.ndarray]) -> tuple[Plan, float] | None:
        """A plan, and the share of its groups that an axis loses on average before coarse axes are made up for."""
        self.rank_scores = rank_scores
        ranking = RANKINGS[self.options.scope](self)
        length = self._shortest(ranking)
        if length is None:
            return None
        trimming, items = Trimming(self), ranking.last(length)
        counts = trimming.trimmed(items, self._counts(ranking, length))
        share = float(np.mean([n / self.graph[name].size for name, n in counts.items() if n] or [0.0]))
        removal = self._removal(trimming.nearer(items, counts))
        if not self._led(removal):
            return None
        plan = Plan.of(self.graph, removal, self._exempt(removal), self.options.branches)
        return None if self.attempt.express and not is_expressible(self.graph, plan.kept()) else (plan, share)

    def _led(self, removal: Mapping[str, np.ndarray]) -> bool:
        """Was all that goes chosen to, or is it tied to what was and goes?"""
        chosen = removal.keys() & set(self.leading)
        return self.settler is None or removal.keys() <= self.settler.tied_to(chosen, removal)

    def refusal(self) -> Unmet:
        """Why there is no plan."""
        customs = customs_that_hold(self.graph)
        held = "".join(f"; {clause} (lift with free=[{name!r}])" for name, clause in customs.items())
        held += why_beyond(self.graph) if self.options.form == "module" else ""
        return self.budget.unmet(self.least, "floors, protections and ties allow", self.budget.unread() + held)

    @cached_property
    def least(self) -> Kept:
        """What is left where all goes that may; everything, where that can't be expressed or wasn't looked at."""
        if self._all is not None and (not self.attempt.express or is_expressible(self.graph, self._all)):
            return self._all
        return self.graph.widths.at({})

    def slack(self, plan: Plan) -> float:
        """How far below the target a plan went, as a share of the limit that it came nearest to."""
        spent = self.budget.spent_at(plan.kept())
        tightest = self.budget.tightest(spent)
        return 1 - spent[tightest] / max(self.budget.limits[tightest], self.budget.least(tightest))

    @property
    def limit(self) -> float:
        """The target's first limit."""
        return self.budget.limits[self.budget.metric]

    def is_near(self, plan: Plan) -> bool:
        """Is a plan within what one group costs of the target, or one group of each axis of a tie?"""
        ties = [tie.axes for tie in self.settler.ties] if self.settler is not None else []
        sets = [(name,) for name in self.leading] + [tuple(a for a in tie if a in self.order) for tie in ties]
        spent = self.budget.spent_at(plan.kept())
        tightest = self.budget.tightest(spent)
        slack, dense = self.budget.limits[tightest] - spent[tightest], self.budget.spent({})[tightest]
        steps = (self.budget.spent(self._removal(self.first(names))) for names in sets)
        return slack <= 0 or any(dense - step[tightest] >= slack for step in steps)

    def _shortest(self, ranking: Ranking) -> int | None:
        """A beginning of the ranking that meets the target by less than its last item; None where all of it doesn't.

        Settling costs time, so the search begins with where the target is met without.
        """
        self._all = self.graph.widths.at(self._removal(self._counts(ranking, len(ranking))))
        above, below = (self.budget.over(spent) for spent in (self.budget.spent({}), self.budget.spent_at(self._all)))
        if above <= 0 or below > 0:
            return 0 if above <= 0 else None
        ends, first = (len(ranking), above, below), None
        if self.settler is not None:
            first = crossing(lambda n: self._over_at(self._unsettled(ranking, n)), lambda n: 0.0, ends)
        return crossing(
            lambda n: self._over_at(self._counts(ranking, n)), lambda n: self._over_without(ranking[n - 1]), ends, first
        )

    def _over_at(self, counts: Counts) -> float:
        return self.budget.over(self.budget.spent(self._removal(counts)))

    def _over_without(self, item: Item) -> float:
        """The share of the dense cost that the last item of a beginning saves by itself, in the target's first metric."""
        dense = self.spent({})
        return (dense - self.spent(dict.fromkeys(item, 1))) / max(dense, self.budget.least(self.budget.metric))

    def _exempt(self, removal: Mapping[str, np.ndarray]) -> list[str]:
        """Notes where axes too small for `round_to` lose groups, and where no multiple is left of others."""
        step, small = self.options.round_to, [name for name in removal if self.rounding.is_small(name)]
        left = {a.name: a.size - len(removal.get(a.name, ())) for a in self.graph.axes if a.prunable.any()}
        if not self.rounding.named:
            left = {name: left[name] for name in removal if name not in small}
        odd = [name for name, size in left.items() if size % self.rounding.step(name)]
        notes = (
            [f"{axis_and_more(small)} has fewer than {step} groups, so round_to={step} doesn't hold there"]
            if small
            else []
        )
        return notes + ([f"{axis_and_more(odd)} keeps a size that round_to={step!r} doesn't allow"] if odd else [])

    def spent(self, counts: Counts) -> float:
        """What is left, in the target's first metric, when these numbers of groups go."""
        return self.budget.spent(self._removal(counts))[self.budget.metric]

    def met_by(self, counts: Counts) -> bool:
        """Is the target met when these numbers of groups go?"""
        return self.budget.met(self.budget.spent(self._removal(counts)))

    def _unsettled(self, ranking: Ranking, length: int) -> Counts:
        """How many groups of each axis a beginning of the ranking takes."""
        gone = ranking.counts(length)
        gone.update({n: gone.get(n, 0) for n in self.leading if self.rounding.odd(n, self.graph[n].size)})
        return {n: min(self.cap[n], self.rounded(self.graph[n], min(m, self.cap[n]))) for n, m in gone.items()}

    def _counts(self, ranking: Ranking, length: int) -> Counts:
        """The same, settled."""
        counts = self._unsettled(ranking, length)
        return counts if self.settler is None else self.settler.settle(counts)

    def rounded(self, axis: Axis, count: int) -> int:
        """The largest number up to `count` that leaves a multiple of `round_to`, and at which the axis may stop."""
        count = self.rounding.most(axis.name, axis.size, count)
        if axis.name in self.stops:
            found = self.stops[axis.name]
            count = found[place - 1] if (place := bisect_right(found, count)) else 0
        return count

    def _removal(self, counts: Counts) -> dict[str, np.ndarray]:
        return {name: self.order[name][:n] for name, n in counts.items() if n}
