"""Sizes that the module's Python computes from one another must stay consistent: the planner's numbers are bent to that.

A *tie* is a set of places whose sizes must agree: those that one attribute supplies, the equal parts of a `chunk`, a size
that is half of another. Where a choice breaks a tie, the axes on the larger side lose further groups, the lowest scores
first; where they can't, groups come back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from depgraph.capture.recording import Site
from depgraph.capture.sizes import Attr, attributes
from depgraph.cutting.expressible import is_expressible
from depgraph.cutting.expressing import SizeRules, Solution
from depgraph.cutting.ties import Tie, find_ties
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Counts = dict[str, int]


@dataclass
class Settler:
    """Bends the numbers of groups to remove, for one order of groups in each axis.

    Axes in `keep_some` are never taken back to losing nothing: a tie that only this would mend stays broken. Of an axis in
    `steps` a multiple stays, or all, where ties can be kept so.
    """

    rules: SizeRules
    order: dict[str, np.ndarray]
    cap: Counts
    keep_some: frozenset[str] = frozenset()
    steps: Mapping[str, int] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    _known: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)
    _of_axis: dict[str, list[int]] = field(default_factory=dict)
    _looked_at: tuple[Counts, set[int]] = field(default_factory=lambda: ({}, set()))

    def __post_init__(self) -> None:
        whole = {axis.name for axis in self.rules.graph.axes if axis.tried}
        every = self.rules.once("ties", lambda: find_ties(self.rules))
        self.ties = [t for t in every if any(a in self.order and a not in whole for a in t.axes)]
        for k, tie in enumerate(self.ties):
            for axis in tie.axes:
                self._of_axis.setdefault(axis, []).append(k)

    def settle(self, counts: Counts) -> Counts:
        """The nearest numbers that keep all ties that can be kept; no multiples, where only others keep all of them."""
        found = self._kept(counts, self.steps)
        if self.steps and self.broken(found):
            other = self._kept(counts, {})
            return found if self.broken(other) else other
        return found

    def _kept(self, counts: Counts, steps: Mapping[str, int]) -> Counts:
        found = self._settle(dict(counts), (1, -1), steps)
        if self.broken(found):
            further = self._settle(dict(found), (1,), steps)
            return found if self.broken(further) else further
        return found

    def tied_to(self, names: Iterable[str], among: Iterable[str]) -> set[str]:
        """These axes, and those of `among` that ties join to them, one after the other."""
        found, left, before = set(names), set(among), -1
        while len(found) > before:
            before = len(found)
            found |= {a for tie in self.ties if not found.isdisjoint(tie.axes) for a in tie.axes if a in left}
        return found

    def broken(self, counts: Counts) -> list[int]:
        """The numbers of the ties that `counts` doesn't keep: a tie none of whose axes loses anything is kept.

        Only those of axes that were asked about with other numbers before are looked at.
        """
        before, found = self._looked_at
        moved = {axis for axis in counts.keys() | before.keys() if counts.get(axis, 0) != before.get(axis, 0)}
        again = {k for axis in moved for k in self._of_axis.get(axis, ())}
        found = (found - again) | {k for k in again if self._gap(k, self.ties[k], counts)}
        self._looked_at = dict(counts), found
        return sorted(found)

    def _settle(self, counts: Counts, directions: tuple[int, ...], steps: Mapping[str, int]) -> Counts:
        """Mend ties in turn; with both directions they may undo one another, with one they can't.

        So many rounds are made; where numbers come again, all rounds between were for nothing, and those like them are left out.
        """
        stuck: set[int] = set()
        seen: dict[tuple[frozenset[tuple[str, int]], int], int] = {}
        rounds = len(self.ties) + 8
        while rounds > 0 and (broken := [k for k in self.broken(counts) if k not in stuck]):
            state = (frozenset(counts.items()), len(stuck))
            if state in seen:
                rounds %= seen[state] - rounds
            seen[state] = rounds
            for k in broken if rounds else ():
                if not any(self._mend(k, counts, direction, steps) for direction in directions):
                    stuck.add(k)
            rounds -= 1
        return counts

    def _mend(self, k: int, counts: Counts, direction: int, steps: Mapping[str, int]) -> bool:
        """Move axes in one direction as long as the gap closes; undone when it doesn't close.

        Steps of several groups may have to widen it first.
        """
        tie = self.ties[k]
        first = [
            self._moved(counts, a, direction, steps) for a in tie.axes if steps.keys() & tie.axes and a in self.order
        ]
        for begun in (dict(counts), *first):
            trial = self._closed(k, begun, direction, steps)
            if trial is not None and not any(
                not trial[axis] for axis in self.keep_some & counts.keys() if counts[axis]
            ):
                counts.update(trial)
                return True
        return False

    def _closed(self, k: int, trial: Counts, direction: int, steps: Mapping[str, int]) -> Counts | None:
        """The numbers after moves in one direction, each of which narrows the gap of a tie, when it closes.

        Steps of several groups may also leave the gap as it is, the finest first.
        """
        tie = self.ties[k]
        if not all(self._within(trial, a) for a in tie.axes if trial.get(a)):
            return None
        gap, stepped = self._gap(k, tie, trial), not steps.keys().isdisjoint(tie.axes)
        while gap:
            moved = {a: self._moved(trial, a, direction, steps) for a in tie.axes if a in self.order}
            moved = {a: one for a, one in moved.items() if self._within(one, a) and one[a] != trial.get(a)}
            gaps = [
                (self._gap(k, tie, one), self._share(trial, one, a) if stepped else 0.0, a) for a, one in moved.items()
            ]
            best, _, axis = min(gaps, default=(math.inf, 0.0, ""))
            if best > gap or best == gap and not stepped:
                return None
            leap = max(1, int(gap // max(gap - best, 1)) - 1)
            ahead = self._moved(trial, axis, direction * leap, steps)
            if leap > 1 and self._within(ahead, axis) and self._gap(k, tie, ahead) < best:
                trial, gap = ahead, self._gap(k, tie, ahead)
            else:
                trial, gap = moved[axis], int(best)
        return trial

    def _share(self, before: Counts, after: Counts, axis: str) -> float:
        """Which share of its groups a move takes from an axis, or gives back."""
        return abs(after[axis] - before.get(axis, 0)) / self.rules.graph[axis].size

    def _within(self, counts: Counts, axis: str) -> bool:
        return 0 <= counts[axis] <= self.cap.get(axis, 0)

    def _moved(self, counts: Counts, axis: str, by: int, steps: Mapping[str, int]) -> Counts:
        """`counts` with so many more groups of an axis, or steps of several."""
        count, step = counts.get(axis, 0), steps.get(axis, 1)
        if step == 1:
            return {**counts, axis: count + by}
        size = self.rules.graph[axis].size
        stay = (-((count - size) // step) if by > 0 else (size - count) // step) - by
        return {**counts, axis: max(size - stay * step, 0)}

    def _gap(self, k: int, tie: Tie, counts: Counts) -> int:
        key = (k, tuple(counts.get(a, 0) for a in tie.axes))
        if key not in self._known:
            removal = {a: self.order[a][: counts[a]] for a in tie.axes if counts.get(a) and a in self.order}
            self._known[key] = gap(self.rules, tie, self.rules.graph.widths.at(removal)) if removal else 0
        return self._known[key]


def inexpressible(graph: DependencyGraph) -> frozenset[str]:
    """Axes that the module's Python can't narrow even by one group, however the others follow."""
    return graph.sizes.once("inexpressible", lambda: _inexpressible(graph))


def _inexpressible(graph: DependencyGraph) -> frozenset[str]:
    free = {axis.name: np.flatnonzero(axis.prunable) for axis in graph.axes}
    settler = Settler(graph.sizes, free, {name: min(len(f), graph[name].size - 1) for name, f in free.items()})
    pinned, held = set(), graph.held()
    for name, groups in free.items():
        if len(groups) and graph[name].size > 1:
            counts = settler.settle({name: 1})
            removal = {a: free[a][:n] for a, n in counts.items() if n}
            if name not in removal or not is_expressible(graph, graph.widths.at(removal), held):
                pinned.add(name)
    return frozenset(pinned)


def config_bound(graph: DependencyGraph) -> frozenset[str]:
    """Axes whose narrowing a model built anew from an edited config couldn't repeat.

    Those that reach a buffer which isn't saved (it is computed again from sizes), and those that two activations are
    contracted over (attention's scale is computed from their width).
    """
    program = graph.capture.program
    unsaved = set(graph.capture.exported.graph_signature.non_persistent_buffers)
    bound = {a.name for a in graph.axes if any(m.target in unsaved for m in a.members)}
    weights = {v.name for v in program.values.values() if v.kind == "parameter"}
    nodes = graph.sizes.nodes
    weights |= {n.name for n in nodes.values() if len(n.all_input_nodes) == 1 and n.all_input_nodes[0].name in weights}
    operands: dict[str, set[str]] = {}
    for c in program.relations.contractions:
        operands.setdefault(c.op, set()).add(c.operand)
    for c in program.relations.contractions:
        if not operands[c.op] & weights and len(operands[c.op]) > 1:
            bound |= set(graph.widths.axes_of(program.values[c.operand].dim(c.dim)))
    return frozenset(bound)


def gap(rules: SizeRules, tie: Tie, kept: Kept) -> int:
    """How far the sizes of a tie are apart under a cut; 0 when they agree."""
    if tie.node:
        changed = rules.rewritten(tie.node, kept)
        if changed is None or changed.target is None:
            return 0
        sizes = [changed.shape(v)[changed.arguments["dim"]] for v in changed.outputs]
        return max(sum(abs(s - sizes[0]) for s in sizes), 1)
    if tie.comparison is not None:
        known = Solution(_known_attributes(rules, tie, kept))
        sides = [rules.value(side, kept, known) for side in (tie.comparison.left, tie.comparison.right)]
        return 0 if None in sides else abs(sides[0] - sides[1])
    needs = [rules.needed(site, kept) for site in tie.sites]
    if any(n is None for n in needs):
        return 1
    if isinstance(tie.sites[0].expr, Attr):
        firm = [n for n, site in zip(needs, tie.sites, strict=True) if not rules.runs_out(site)]
        return sum(n - min(firm) for n in firm)
    known = Solution(_known_attributes(rules, tie, kept))
    _guess_unknown(rules, tie, needs, kept, known)
    gives = [rules.value(site.expr, kept, known) for site in tie.sites]  # type: ignore[arg-type]
    return int(sum(abs(n - g) if g is not None else n for n, g in zip(needs, gives, strict=True)))


def _guess_unknown(rules: SizeRules, tie: Tie, needs: list[int], kept: Kept, known: Solution) -> None:
    """Attributes that stand only within expressions take what fits best where they are the last unknown."""
    inner = dict.fromkeys(a for site in tie.sites for a in sorted(attributes(site.expr), key=str))  # type: ignore[arg-type]
    left = [a for a in inner if a not in known.attributes]
    while left:
        ready = {a: _where_last(tie, a, left) for a in left}
        attr = next((a for a in left if ready[a]), left[0])
        places = [(tie.sites[k], needs[k]) for k in ready[attr]]

        def apart(value: int, attr: Attr = attr, places: list[tuple[Site, int]] = places) -> int:
            gives = [(need, rules.value(site.expr, kept, known, {attr: value})) for site, need in places]  # type: ignore[arg-type]
            return int(sum(abs(need - g) if g is not None else need for need, g in gives))

        now = rules.now(attr)
        known.attributes[attr] = min(range(now, 0, -1), key=apart, default=now) if places else now
        left.remove(attr)


def _where_last(tie: Tie, attr: Attr, left: list[Attr]) -> list[int]:
    """The sites of a tie whose only unknown attribute is `attr`."""
    unknown = [attributes(site.expr) & set(left) for site in tie.sites]  # type: ignore[arg-type]
    return [k for k, names in enumerate(unknown) if names == {attr}]


def _known_attributes(rules: SizeRules, tie: Tie, kept: Kept) -> dict[Attr, int]:
    """Attributes in a tie's expressions that stand alone somewhere: the smallest value that such a place needs."""
    found = {}
    for attr, sites in tie.alone:
        needs = [n for site in sites if (n := rules.needed(site, kept)) is not None]
        if needs:
            found[attr] = min(needs)
    return found
