"""What a plan takes beyond its target comes back: settling and coarse axes make costs jump.

The same share of every axis comes back first, then of those that no tie binds to another, and then single groups, the last
to go first, so that the number of trials grows with the axes, not with their groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

from depgraph.rankings import Item

if TYPE_CHECKING:
    from depgraph.choosing import Choice, Counts

_HALVINGS, _ROUNDS = 6, 2
_NEAR = 0.01  # of the dense cost


class Trimming:
    """Puts groups back that a choice took, counted by axis, as long as its target is met."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def trimmed(self, items: list[Item], counts: Counts) -> Counts:
        """`counts` with more kept, until the target is met by less than the first of `items` saves by itself.

        `items` are the axes that lost groups, the last to lose one first. Steps of a staircase are of many heights, so there
        each axis is tried for what its own would still leave of the budget.
        """
        return self._put_back_until(self._first_step(items), items, counts, [counts.keys()])

    def nearer(self, items: list[Item], counts: Counts) -> Counts:
        """The same until the target is nearly met, where the first of `items` is a coarse axis."""
        if self.choice.stops:
            return counts
        most = min(self._first_step(items), _NEAR * self.choice.spent({}))
        return self._put_back_until(most, items, counts, [counts.keys(), counts.keys() - self._tied()])

    def _first_step(self, items: list[Item]) -> float:
        choice = self.choice
        return choice.spent({}) - choice.spent(choice.first(items[0])) if items else 0.0

    def _put_back_until(self, most: float, items: list[Item], counts: Counts, sets: list[Set[str]]) -> Counts:
        """Put back shares of each of `sets` of axes in turn, then single groups, until at most `most` of the budget is left."""

        def is_done() -> bool:
            return not self.choice.stops and self.choice.limit - self.choice.spent(counts) <= most

        for names in () if self.choice.stops or not items else sets:
            counts = counts if is_done() else self._share_put_back(names, counts)
        for item in items * _ROUNDS:
            if is_done():
                break
            counts = self._put_back(item, counts)
        return counts

    def _tied(self) -> set[str]:
        settler = self.choice.settler
        return set() if settler is None else {name for tie in settler.ties for name in tie.axes}

    def _share_put_back(self, names: Iterable[str], counts: Counts) -> Counts:
        """`counts` with the largest share of those of `names` kept, the same for all, that still meets the target."""
        least, most = 0.0, 1.0
        for _ in range(_HALVINGS):
            share = (least + most) / 2
            fewer = {name: self._rounded(name, round(counts[name] * (1 - share))) for name in names}
            trial = self._trial(counts, {**counts, **fewer})
            if trial is None:
                most = share
            else:
                counts, least, most = trial, 0.0, (most - share) / (1 - share)
        return counts

    def _put_back(self, item: Item, counts: Counts) -> Counts:
        """`counts` with one more group of each axis of `item` kept, if the target is still met with less slack."""
        if not all(counts.get(name) for name in item):
            return counts
        fewer = {name: self._rounded(name, counts[name] - 1) for name in item}
        return self._trial(counts, {**counts, **fewer}) or counts

    def _rounded(self, name: str, count: int) -> int:
        return self.choice.rounded(self.choice.graph[name], count)

    def _trial(self, counts: Counts, fewer: Counts) -> Counts | None:
        """`fewer`, settled as `counts` are, where that meets the target with less slack."""
        choice = self.choice
        if not choice.met_by(fewer):
            return None
        if choice.settler is not None and (not choice.attempt.bold or not choice.settler.broken(counts)):
            fewer = choice.settler.settle(fewer)
        dearer = choice.spent(fewer) > choice.spent(counts)
        return fewer if dearer and choice.met_by(fewer) else None
