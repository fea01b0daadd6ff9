"""Which narrowings a config can express: found by trying, from its integers one at a time to four at once.

A *move* takes a fixed amount off some integers of the config, and so some groups off some axes: one neuron of every MLP; or
one head and the twelve channels of the hidden width that make up for it, where the class computes the head dimension as
their quotient. Moves are kept that go together with those found before, the finest first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from depgraph.configs import Configs, Edits, Place, Shapes
from depgraph.explaining import Counts, Explainer
from depgraph.repeating import Repeated

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_MOST_BUILDS, _MOST_PARTNERS, _MOST_STEPS = 1500, 6, 24
_FINE = 1 / 6  # moves that take more of an axis at once come last: they may bar finer ones
_PROBES = (1, 3)  # a place that obeys neither of these holds no size
Amounts = dict[Place, int]
Unit = tuple[Place, ...]


@dataclass(frozen=True)
class Move:
    """What one step takes off the integers of the config (`amounts`) and off the axes (`counts`, in groups)."""

    amounts: Amounts
    counts: Counts
    most: int
    share: float


@dataclass
class Finder:
    """Searches moves for one model; `pins` are unset places with the values that the class takes for them."""

    graph: DependencyGraph
    configs: Configs
    explainer: Explainer
    moves: list[Move] = field(default_factory=list)
    pins: Amounts = field(default_factory=dict)
    _scaling: set[frozenset[str]] = field(default_factory=set)
    _last: tuple[frozenset[tuple[Place, int]], Repeated] | None = None
    _same: dict[tuple[frozenset[str], frozenset[Place]], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = dict(self.configs.integers)
        self.sizes = {axis.size for axis in self.graph.axes}
        self.dense = self.configs.shapes({}) or {}
        if not self.dense or any(self.explainer.dense.get(n, s) != s for n, s in self.dense.items()):
            return
        self._pin()
        barred = self._singles(_FINE, self.values)
        self._joint(barred)
        self._singles(1.0, self.values.keys() - barred)

    def edits(self, steps: Iterable[tuple[Move, int]]) -> dict[Place, int]:
        """The edits of the config that make so many steps of each move."""
        values = dict(self.values)
        for move, n in steps:
            for place, amount in move.amounts.items():
                values[place] -= n * amount
        found = {p: v for p, v in values.items() if v != self.values[p]}
        return {**self.pins, **found}

    def shapes(self, edits: Edits) -> Shapes | None:
        """What the edited config builds; None where it is refused, or where other parameters are made."""
        shapes = self.configs.shapes(edits)
        return shapes if shapes is not None and shapes.keys() == self.dense.keys() else None

    def same(self, edits: Edits, counts: Counts) -> bool:
        """Does the model of the edited config compute what the cut computes? Kept for these axes and places.

        Where it computes with other numbers, such as a scale, so it will when further axes are cut as well.
        """
        touched = frozenset(counts)
        key = touched, frozenset(edits)
        if key not in self._same:
            barred = any(axes <= touched for axes in self._scaling)
            self._same[key] = not barred and not self.why_not(edits, counts)
        return self._same[key]

    def why_not(self, edits: Edits, counts: Counts) -> str:
        """In what the model of the edited config isn't the cut one; empty where it is in nothing."""
        kept = self.graph.widths.at(self.explainer.removal(counts))
        if conflicts := self.graph.sizes.solve(kept).conflicts:
            return f"the module's code can't express the cut, {conflicts[0]}"
        try:
            repeated = self._repeated(edits)
        except Exception as error:
            return f"it can't be built: {error}"
        if repeated.numbers and not repeated.sizes(self.graph, kept):
            self._scaling.add(frozenset(counts))
        return repeated.difference(self.graph, kept)

    def _repeated(self, edits: Edits) -> Repeated:
        """The captured model of a config; the last one is kept, as several cuts may be compared with it."""
        key = frozenset(edits.items())
        if self._last is None or self._last[0] != key:
            device = "meta" if any(p.is_meta for p in self.graph.model.parameters()) else "cpu"
            self._last = key, Repeated.of(self.graph, self.configs.model(edits, device))
        return self._last[1]

    def _pin(self) -> None:
        """Find the unset places that hold a size, and the size that the class takes while they are unset."""
        for place in self.configs.unset:
            if all(self.configs.shapes({place: probe}) == self.dense for probe in _PROBES):
                continue
            for size in sorted(self.sizes - {1}):
                if self.configs.shapes({place: size}) == self.dense and self._obeyed(place, size):
                    self.pins[place] = size
                    break
        if self.configs.shapes(self.pins) != self.dense:
            self.pins = {}
        self.values.update(self.pins)

    def _obeyed(self, place: Place, size: int) -> bool:
        lower = [self.shapes({place: size - step}) for step in (1, *_divisors(size)) if size - step > 0]
        return any(s is not None and s != self.dense and any(self.explainer.solutions(s)) for s in lower)

    def _singles(self, coarsest: float, places: Iterable[Place]) -> set[Place]:
        """Moves of one integer, up to a share of an axis at once; gives the places that no cut can follow."""
        barred = set()
        for place in sorted(places, key=lambda p: (-self.values[p], p)):
            value = self.values[place]
            if value < 2 or self._exhausted():
                barred.add(place)
                continue
            for step in (1, *_divisors(value))[:_MOST_STEPS]:
                if not self._possible({place: step}):
                    barred.add(place)
                    break
                if self._try({place: step}, coarsest):
                    break
        return barred

    def _joint(self, barred: set[Place]) -> None:
        """Moves of several integers in proportion, for those that can't go alone."""
        alone = {p for move in self.moves for p, step in move.amounts.items() if step == 1}
        open_places = [p for p in self.values if p not in barred and not self._idle(p)]
        units = [*((p,) for p in open_places if p not in alone), *_lists(open_places)]
        for unit in sorted(units, key=lambda u: (-self.values[u[0]], u)):
            if len(unit) > 1 or any(unit[0] in move.amounts for move in self.moves):
                continue
            for amounts in self._proportions(unit, [u for u in units if not set(u) & set(unit)]):
                if self._exhausted() or self._try(amounts):
                    break

    def _idle(self, place: Place) -> bool:
        """Does an integer say nothing about sizes, such as the number of a token?"""
        value = self.values[place]
        near = [value + by for by in (-1, -2, 1) if value + by > 0]
        return all(self.configs.shapes({**self.pins, place: v}) == self.dense for v in near)

    def _without_idle(self, amounts: Amounts, counts: Counts) -> Amounts:
        """The amounts without those that make no difference."""
        for place in [*amounts][1:]:
            fewer = {p: a for p, a in amounts.items() if p != place}
            alike = self.shapes(self._down(fewer)) == self.shapes(self._down(amounts))
            amounts = fewer if alike and self.same(self._down(fewer), counts) else amounts
        return amounts

    def _proportions(self, unit: Unit, others: list[Unit]) -> Iterator[Amounts]:
        value = self.values[unit[0]]
        fits = [u for u in others if all(self.values[p] > 1 for p in u) and value % self.values[u[0]] == 0]
        fits.sort(key=lambda u: (self.values[u[0]] not in self.sizes, -self.values[u[0]], u))
        for many in (1, 2, 3):
            for chosen in itertools.combinations(fits[:_MOST_PARTNERS], many):
                places = [p for u in (unit, *chosen) for p in u]
                if len(set(places)) < len(places):
                    continue
                common = math.gcd(*(self.values[p] for p in places))
                for k in _divisors(common):
                    yield {p: self.values[p] // common * k for p in places}

    def _possible(self, amounts: Amounts) -> bool:
        """Could some cut follow, as far as the dims say that change?"""
        shapes = self.configs.shapes(self._down(amounts))
        return shapes is None or self.explainer.reachable(shapes)

    def _down(self, amounts: Amounts) -> dict[Place, int]:
        return {**self.pins, **{p: self.values[p] - a for p, a in amounts.items()}}

    def _try(self, amounts: Amounts, coarsest: float = 1.0) -> bool:
        """Keep a move if a cut follows it, the rebuilt model would compute the same, and it goes with the other moves."""
        edits = self._down(amounts)
        shapes = self.shapes(edits)
        covered = {axis for move in self.moves for axis in move.counts}
        for counts in self.explainer.solutions(shapes) if shapes else ():
            if set(counts) <= covered:
                continue
            move = self._move(amounts, counts)
            if move.most and move.share <= coarsest and self._goes_along(move) and self.same(edits, counts):
                self.moves.append(self._move(self._without_idle(amounts, counts), counts))
                return True
        return False

    def _move(self, amounts: Amounts, counts: Counts) -> Move:
        most = min(self.explainer.cap[a] // n for a, n in counts.items())
        most = min([most, *((self.values[p] - 1) // a for p, a in amounts.items())])
        return Move(amounts, counts, most, max(n / self.graph[a].size for a, n in counts.items()))

    def _goes_along(self, move: Move) -> bool:
        """Do steps of this move add up, and one with those of all moves so far?"""
        several = [[(move, n)] for n in (2, 3) if n <= move.most]
        return all(self._adds_up(steps) for steps in (*several, [(m, 1) for m in (*self.moves, move)]))

    def _adds_up(self, steps: list[tuple[Move, int]]) -> bool:
        shapes = self.shapes(self.edits(steps))
        return shapes is not None and self.explainer.leaves(added(steps), shapes)

    def _exhausted(self) -> bool:
        return self.configs.builds > _MOST_BUILDS


def added(steps: Iterable[tuple[Move, int]]) -> Counts:
    """The groups that go when so many steps of each move are made."""
    total: Counts = {}
    for move, times in steps:
        for axis, n in move.counts.items():
            total[axis] = total.get(axis, 0) + n * times
    return {axis: n for axis, n in total.items() if n}


def _divisors(value: int) -> list[int]:
    return [d for d in range(1, value // 2 + 1) if value % d == 0]


def _lists(places: list[Place]) -> list[Unit]:
    """Lists of integers, as wholes."""
    found: dict[Place, list[Place]] = {}
    for place in places:
        if place[-1].isdigit():
            found.setdefault(place[:-1], []).append(place)
    return [tuple(unit) for unit in found.values() if len(unit) > 1]
