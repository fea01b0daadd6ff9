"""In which order groups go: rankings, each a list of axes (of one, or of several at once) that lose one more group in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from depgraph.budget import LATENCY

if TYPE_CHECKING:
    from depgraph.choosing import Choice

Item = tuple[str, ...]
_TILT, _MOST_TILT = 0.5, 1.25
_TILTED = (0.35, 0.5)  # of the dense time: from where on axes are tilted, and from where on as far as they may be


def _global_ranking(choice: Choice) -> list[Item]:
    """All groups of all axes by score; ties by axis and then by position, so that the order is the same everywhere."""
    entries = []
    for k, name in enumerate(choice.leading):
        scores = choice.rank_scores[name][choice.order[name]]
        entries += [(float(scores[i]), k, i, name) for i in range(choice.cap[name])]
    return [(name,) for _, _, _, name in sorted(entries)]


def _axis_ranking(choice: Choice) -> list[Item]:
    """Axes take turns, so that all lose the same share; where time is limited, more of what takes much time for its parameters."""
    entries, tilt = [], _tilt(choice)
    for k, name in enumerate(choice.leading):
        size = choice.graph[name].size
        entries += [((i + 1) / size / tilt[name], k, name) for i in range(choice.cap[name])]
    return [(name,) for _, _, name in sorted(entries)]


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


def _uniform_ranking(choice: Choice) -> list[Item]:
    """Kinds of axes take turns; a kind loses one group of each of its axes at once."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for name in choice.leading:
        axis = choice.graph[name]
        kinds.setdefault((axis.kind, axis.size), []).append(name)
    entries = []
    for k, ((_, size), names) in enumerate(kinds.items()):
        cap = min(choice.cap[n] for n in names)
        entries += [((i + 1) / size, k, tuple(names)) for i in range(cap)]
    return [item for _, _, item in sorted(entries)]


RANKINGS: dict[str, Callable[[Choice], list[Item]]] = {
    "global": _global_ranking,
    "axis": _axis_ranking,
    "uniform": _uniform_ranking,
}
