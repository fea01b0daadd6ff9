"""Axes of a model before and after a cut: names change where they tell of positions, and sizes do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from depgraph import Axis, DependencyGraph
from depgraph.cutting.record import cuts


def followed(left: Mapping[str, int], after: Iterable[Axis]) -> dict[str, str]:
    """The name before a cut of every axis of the cut model, by its name now, as far as it can be told.

    `left` has the groups that the cut leaves of each axis, in the order of the graph.
    Names lose the positions of a slice, `[0:144]`; axes that are called alike then keep their order. An axis that is left with
    one group is none any more.
    """
    before, now = _by_stem(left), _by_stem(axis.name for axis in after)
    found: dict[str, str] = {}
    for stem, names in now.items():
        old = before[stem]
        if len(old) != len(names):
            old = [name for name in old if left[name] > 1]
        if len(old) == len(names):
            found |= dict(zip(names, old, strict=True))
    return found


def first_size(graph: DependencyGraph, axis: Axis) -> int:
    """How many groups an axis had before the first cut that the model's record tells of."""
    size, record = axis.size, getattr(graph.model, "depgraph_record", None)
    for cut in reversed(cuts(record)):
        alike = [entry for name, entry in cut["axes"].items() if _stem(name) == _stem(axis.name)]
        size = next((int(before) for before, gone in alike if before - gone == size), size)
    return size


def _by_stem(names: Iterable[str]) -> Mapping[str, list[str]]:
    found = defaultdict(list)
    for name in names:
        found[_stem(name)].append(name)
    return found


def _stem(name: str) -> str:
    return re.sub(r"\[\d+:\d+\]", "", name)
