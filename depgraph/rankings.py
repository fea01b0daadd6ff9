"""In which order groups go: rankings, each a list of axes (of one, or of several at once) that lose one more group in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from depgraph.budget import LATENCY

if TYPE_CHECKING:
    from depgraph.choosing import Choice

Item = tuple[str, ...]
_TILT, _MOST_TILT = 0.5, 1.25
_TILTED = (0.35, 0.5)  # of the dense time: from where on axes are tilted, and from where on as far as they may be


class Ranking:
    """Items in the order in which they lose one more group, each as often as it has groups to lose."""

    def __init__(self, items: list[Item], keys: list[np.ndarray]) -> None:
        """`keys[k]` ranks the groups of `items[k]`, lowest first; equal keys go by item, and then by position."""
        every = np.concatenate([np.zeros(0), *keys])
        codes = np.repeat(np.arange(len(items)), [len(key) for key in keys])[np.argsort(every, kind="stable")]
        first = np.full(len(items), len(codes))
        first[codes[::-1]] = np.arange(len(codes))[::-1]
        order = np.argsort(first, kind="stable")
        self.items = [items[k] for k in order]
        self._codes = np.argsort(order)[codes]

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, place: int) -> Item:
        return self.items[self._codes[place]]

    def counts(self, length: int) -> dict[str, int]:
        """How many groups of each axis the first `length` places take, axes in the order in which they begin to."""
        found: dict[str, int] = {}
        for item, count in zip(self.items, np.bincount(self._codes[:length]).tolist(), strict=False):
            for name in item if count else ():
                found[name] = found.get(name, 0) + count
        return found

    def last(self, length: int) -> list[Item]:
        """The items among the first `length` places, the last to lose a group first."""
        codes = self._codes[:length]
        place = np.full(len(self.items), -1)
        place[codes] = np.arange(length)
        return [self.items[k] for k in np.argsort(-place, kind="stable") if place[k] >= 0]


def _global_ranking(choice: Choice) -> Ranking:
    """All groups of all axes by score; ties by axis and then by position, so that the order is the same everywhere."""
    keys = [choice.rank_scores[n][choice.order[n][: choice.cap[n]]] for n in choice.leading]
    return Ranking([(name,) for name in choice.leading], keys)


def _axis_ranking(choice: Choice) -> Ranking:
    """Axes take turns, so that all lose the same share; where time is limited, more of what takes much time for its parameters."""
    tilt, names = _tilt(choice), choice.leading
    keys = [np.arange(1, choice.cap[n] + 1) / choice.graph[n].size / tilt[n] for n in names]
    return Ranking([(name,) for name in names], keys)


def _tilt(choice: Choice) -> dict[str, float]:
    """How many times faster than others an axis is narrowed: the root of its milliseconds per parameter, within 0.8 and 1.25.

    Milliseconds are bought with parameters, and how many a group has for its time differs a hundredfold between the first and
    the last convolutions: this keeps 10 to 20% more parameters at equal time where equal shares of every axis keep 1 to 5%. More
    parameters aren't more quality, though. The digits CNN is as accurate with and without it down to half of its time, and 3 to 4
    points worse below a third, so the bounds close between these (benchmarks/latency_targets.md).
    """
    if LATENCY not in choice.budget.limits:
        return dict.fromkeys(choice.leading, 1.0)
    dense, most, found = choice.graph.dense_cost.params, _most_tilt(choice), {}
    for name in choice.leading:
        removal = {name: choice.order[name][: choice.cap[name]]}
        saved = 1 - choice.budget.spent(removal)[LATENCY] / choice.budget.dense[LATENCY]
        lost = 1 - choice.graph.cost(removal).params / dense
        tilt = (max(saved, 0.0) / lost) ** _TILT if lost > 0 else most
        found[name] = min(max(tilt, 1 / most), most)
    return found


def _most_tilt(choice: Choice) -> float:
    """1.25 where half of the time may stay, or more, and 1 where no more than 0.35 of it may."""
    share = choice.budget.limits[LATENCY] / choice.budget.dense[LATENCY]
    least, full = _TILTED
    return float(_MOST_TILT ** min(max((share - least) / (full - least), 0.0), 1.0))


def _uniform_ranking(choice: Choice) -> Ranking:
    """Kinds of axes take turns; a kind loses one group of each of its axes at once."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for name in choice.leading:
        axis = choice.graph[name]
        kinds.setdefault((axis.kind, axis.size), []).append(name)
    caps = [min(choice.cap[n] for n in names) for names in kinds.values()]
    keys = [np.arange(1, cap + 1) / size for cap, (_, size) in zip(caps, kinds, strict=True)]
    return Ranking([tuple(names) for names in kinds.values()], keys)


RANKINGS: dict[str, Callable[[Choice], Ranking]] = {
    "global": _global_ranking,
    "axis": _axis_ranking,
    "uniform": _uniform_ranking,
}
