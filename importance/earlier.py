"""Axes of a model before and after a cut: names change where they tell of positions, and sizes do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from depgraph import Axis, DependencyGraph
from depgraph.cutting.record import cuts

Key = tuple[str, int]


def keys(axes: Iterable[Axis]) -> dict[str, Key]:
    """What stays the same of every axis of a graph when the model is cut and traced again, by the axis's name.

    Names lose the positions of a slice, `[0:144]`; axes that are called alike then are told apart by their order.
    """
    seen: Counter[str] = Counter()
    found = {}
    for axis in axes:
        stem = _stem(axis.name)
        found[axis.name] = stem, seen[stem]
        seen[stem] += 1
    return found


def first_size(graph: DependencyGraph, axis: Axis) -> int:
    """How many groups an axis had before the first cut that the model's record tells of."""
    size = axis.size
    for cut in reversed(cuts(getattr(graph.model, "depgraph_record", None))):
        alike = [entry for name, entry in cut["axes"].items() if _stem(name) == _stem(axis.name)]
        size = next((int(before) for before, gone in alike if before - gone == size), size)
    return size


def _stem(name: str) -> str:
    return re.sub(r"\[\d+:\d+\]", "", name)
