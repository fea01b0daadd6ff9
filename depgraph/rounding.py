"""Which numbers of groups may stay: a multiple of a number, or whatever gives the rows of matrices the sizes that a format stores.

A row of a matrix [out, in] is what one output is computed from. Formats of quantised weights store rows in blocks.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from depgraph.classes import NONE

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

BLOCKS = {"gguf": 32, "gguf-k": 256}
"""Numbers in a block, by the name of the rounding: GGUF's simple formats, and its K-quants."""


class Rounding:
    """The steps of one graph's axes for one `round_to`."""

    def __init__(self, graph: DependencyGraph, wanted: int | str) -> None:
        self._graph = graph
        self._wanted = wanted

    @property
    def named(self) -> bool:
        """Are the rows of matrices what counts? Then what doesn't fit isn't cut, and what can't stay as it is goes."""
        return isinstance(self._wanted, str)

    def step(self, name: str) -> int:
        """Of how many groups of an axis a multiple must stay, for the rounding and for operators that take only some sizes."""
        own = self._steps.get(name, 1) if isinstance(self._wanted, str) else self._wanted
        return math.lcm(own, self._graph.widths.step(name))

    def is_small(self, name: str) -> bool:
        """Has an axis fewer groups than a whole number that was asked for, so that it is cut freely?"""
        return isinstance(self._wanted, int) and self._graph[name].size < self._wanted

    def most(self, name: str, size: int, count: int) -> int:
        """The largest number up to `count` of an axis' `size` groups whose removal leaves a multiple.

        Of a named rounding more than `count`, where all of them leave none and fewer blocks do.
        """
        step = self.step(name)
        if size < step:
            return 0 if self.named else count
        stay = math.ceil((size - count) / step) * step
        return size % step if self.named and stay > size else max(size - stay, 0)

    def odd(self, name: str, size: int) -> bool:
        """Must something go even where nothing needs to?"""
        return self.named and size > self.step(name) and size % self.step(name) > 0

    @cached_property
    def _steps(self) -> dict[str, int]:
        block = BLOCKS[str(self._wanted)]
        within = self._within(block)
        found = dict(within)
        for number in self._dims(rows_only=True):
            names = self._graph.widths.reaching.get(number, [])
            others = within.get(names[1], 1) if len(names) == 2 else 1
            outer = [(names[0], others * self._shared(number, names))] if names else []
            for name, together in outer:
                step = block // math.gcd(block, together)
                found[name] = math.lcm(found.get(name, 1), step)
        return found

    def _within(self, block: int) -> dict[str, int]:
        """The steps of axes that lie within the groups of another (channels of heads): as much of a block as they hold."""
        widest: dict[str, tuple[int, int]] = {}
        for number in self._dims(rows_only=False):
            names = self._graph.widths.reaching.get(number, [])
            for name in names[1:]:
                shared = self._shared(number, names) if len(names) == 2 else 1
                size = int(self._graph.classes.size[number])
                widest[name] = max(widest.get(name, (0, 0)), (size, shared))
        sizes = self._graph.widths.axes
        return {n: math.gcd(sizes[n].size, block // math.gcd(block, shared)) for n, (_, shared) in widest.items()}

    def _shared(self, number: int, names: list[str]) -> int:
        """How many indices of a dim go with one group of every axis that reaches it."""
        axes = [self._graph.widths.axes[name] for name in names]
        if len(axes) > 2:
            return 1
        labels = np.stack([axis.labels[number] for axis in axes])
        _, counts = np.unique(labels[:, (labels != NONE).all(0)], axis=1, return_counts=True)
        return int(np.gcd.reduce(counts)) if len(counts) else 1

    def _dims(self, *, rows_only: bool) -> list[int]:
        """The classes of the dims of matrices, in order; only those along rows, or both."""
        program, widths = self._graph.capture.program, self._graph.widths
        matrices = [v for v in program.values.values() if v.kind == "parameter" and v.used and len(v.shape) == 2]
        return list(dict.fromkeys(widths.class_of(m.dim(d)) for m in matrices for d in ((1,) if rows_only else (0, 1))))
