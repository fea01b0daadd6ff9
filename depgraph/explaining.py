"""From the shapes that a config builds back to the groups that must go so that a cut leaves these shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from depgraph.configs import Shapes

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_MOST_SOLUTIONS = 8
Counts = dict[str, int]


class Explainer:
    """Knows which axes reach the dims of what a checkpoint holds, and the order in which each axis loses its groups."""

    def __init__(self, graph: DependencyGraph, order: Mapping[str, np.ndarray], cap: Mapping[str, int]) -> None:
        self.graph = graph
        self.order = order
        self.cap = cap
        self.classes: dict[tuple[str, int], int] = {}
        self.dense: Shapes = {}
        held = [v for v in graph.capture.program.values.values() if v.kind in ("parameter", "buffer") and v.target]
        for value in held:
            self.dense[value.target] = value.shape
            for d, dim in enumerate(value.dims):
                self.classes[value.target, d] = graph.widths.class_of(dim)

    def reachable(self, shapes: Shapes) -> bool:
        """Can every dim that is another than in the dense model change by a cut at all?"""
        return all(self._free(key) for key in self._changed(shapes))

    def solutions(self, shapes: Shapes) -> Iterator[Counts]:
        """How many groups of each axis go where a cut leaves these shapes; several where heads or their width may have gone.

        Where two axes that nothing else tells apart reach a dim, one of the two is taken to be whole, alike in all layers.
        """
        sizes: dict[int, int] = {}
        for (name, d), number in self.classes.items():
            if name not in shapes:
                continue
            if len(shapes[name]) != len(self.dense[name]):
                return
            if sizes.setdefault(number, shapes[name][d]) != shapes[name][d]:
                return
        narrowed = {self.classes[key] for key in self._changed(shapes)}
        whole = {axis for number in sizes if number not in narrowed for axis in self._reaching(number)}
        yield from itertools.islice(
            self._solve(dict.fromkeys(whole, 0), {n: sizes[n] for n in narrowed}), _MOST_SOLUTIONS
        )

    def leaves(self, counts: Counts, shapes: Shapes) -> bool:
        """Does a cut of so many groups leave these shapes?"""
        kept = self.graph.widths.at(self.removal(counts))
        values = self.graph.capture.program.values.values()
        return all(kept.shape(v) == shapes[v.target] for v in values if v.target in shapes and v.target in self.dense)

    def _solve(self, found: Counts, left: dict[int, int]) -> Iterator[Counts]:
        found, left = dict(found), dict(left)
        while left:
            waiting = {n: [a for a in self._reaching(n) if a not in found] for n in left}
            number = min(left, key=lambda n: (len(waiting[n]), n))
            if len(waiting[number]) > 1:
                yield from self._guess(waiting[number], found, left)
                return
            for axis in waiting[number]:
                found[axis] = self._count(axis, number, left[number], found)
            if self._size(number, found) != left.pop(number):
                return
        yield {name: n for name, n in found.items() if n}

    def _guess(self, axes: list[str], found: Counts, left: dict[int, int]) -> Iterator[Counts]:
        for narrowed in sorted(axes, key=lambda a: -len(self.graph[a].members)):
            kinds = {self.graph[a].kind for a in axes if a != narrowed}
            whole = {a.name: 0 for a in self.graph.axes if a.kind in kinds and a.name not in found}
            yield from self._solve({**found, **whole}, left)

    def removal(self, counts: Counts) -> dict[str, np.ndarray]:
        """The groups that go: those that come first in the order of their axis."""
        return {name: self.order[name][:n] for name, n in counts.items() if n}

    def _changed(self, shapes: Shapes) -> list[tuple[str, int]]:
        both = ((n, s, shapes[n]) for n, s in self.dense.items() if n in shapes)
        return [(n, d) for n, old, new in both for d, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]

    def _free(self, key: tuple[str, int]) -> bool:
        return any(self.cap.get(a, 0) for a in self._reaching(self.classes[key]))

    def _reaching(self, number: int) -> list[str]:
        return self.graph.widths.reaching.get(number, [])

    def _size(self, number: int, counts: Counts) -> int:
        axes = self._reaching(number)
        if not axes:
            return -1
        kept = self.graph.widths.at(self.removal({a: counts[a] for a in axes if counts.get(a)})).of_class(number)
        return len(self.graph[axes[0]].labels[number]) if kept is None else len(kept)

    def _count(self, axis: str, number: int, size: int, known: Counts) -> int:
        """How many groups of `axis` must go for a class of dims to be at most `size`, by bisection."""
        low, high = 0, self.cap.get(axis, 0)
        while low < high:
            middle = (low + high) // 2
            if self._size(number, {**known, axis: middle}) > size:
                low = middle + 1
            else:
                high = middle
        return low
