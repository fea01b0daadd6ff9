"""Times between measured widths: grids of one operator, and the staircase on which they lie.

A vectorised convolution takes whole blocks of channels, so its time is a function of the number of blocks. How large a block is,
and which sizes take a slower way beside it, is read off a probe; nothing is assumed of the processor.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_BLOCKS = (64, 32, 16, 8)
_SHORTEST = 1e-6  # milliseconds, so that nothing is divided by nothing
_FLAT = 0.3  # of the deviation that a straight line would have from a staircase: below that it is one
_SLOWER = 1.15  # than its whole block: a size within it goes another way, where most sizes like it are so slow


@dataclass(frozen=True)
class Stairs:
    """Blocks of `step` channels; from `step` on, sizes that are no multiple of `align` don't go by blocks.

    `start` has the times of sizes below one block as shares of that of one.
    """

    step: int = 1
    align: int = 1
    start: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, probe: Mapping[int, float], step: int | None = None) -> Stairs:
        """The staircase of a probe, milliseconds by size; steps of 1 where there is none. `step` where it is known already."""
        times = {c: max(ms, _SHORTEST) for c, ms in sorted(probe.items())}
        step = step or next((s for s in _BLOCKS if _is_staircase(times, s)), 1)
        if step == 1:
            return cls()
        block, align = {c: -(-c // step) * step for c in times}, 1
        while align < step:
            on = [c for c in times if c % (2 * align) == align and c > step and block[c] in times]
            if on and statistics.median(times[c] / times[block[c]] for c in on) < _SLOWER:
                break
            align *= 2
        return cls(step, align, {c: ms / times[step] for c, ms in times.items() if c <= step})

    def up(self, size: int) -> int:
        """The size of whole blocks that hold so many channels."""
        return -(-size // self.step) * self.step

    def by_blocks(self, size: int) -> bool:
        """Does a size go by blocks?"""
        return size < self.step or size % self.align == 0

    def share(self, size: int) -> float:
        """Its time as a share of that of its blocks, where there is less than one."""
        return _line(self.start, size) if size < self.step and self.start else 1.0


def _is_staircase(times: Mapping[int, float], step: int) -> bool:
    """Do the times of multiples of 4 (which all fast ways take) lie on a staircase rather than on a line?"""
    sizes = [c for c in times if c % 4 == 0 and c > step and c % step and -(-c // step) * step in times]
    if len(sizes) < 4:
        return False
    blocks = [-(-c // step) * step for c in sizes]
    apart = statistics.median(abs(times[c] / times[b] - 1) for c, b in zip(sizes, blocks, strict=True))
    line = statistics.median(1 - c / b for c, b in zip(sizes, blocks, strict=True))
    return apart < _FLAT * line


def _line(points: Mapping[int, float], at: float) -> float:
    """Piecewise linear through points (ascending), going on at the ends as it goes there."""
    places = list(points)
    if len(places) == 1:
        return points[places[0]]
    k = min(max(bisect_left(places, at), 1), len(places) - 1)
    left, right = places[k - 1], places[k]
    found = points[left] + (points[right] - points[left]) * (at - left) / (right - left)
    return max(found, 0.1 * min(points.values()))


def _ascending(times: Mapping[int, float]) -> dict[int, float]:
    """No whole blocks take longer than more of them: where they seem to, something else ran meanwhile."""
    found, least = {}, math.inf
    for size, ms in sorted(times.items(), reverse=True):
        found[size] = least = min(least, ms)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Grid:
    """Milliseconds at widths in and out; between them they are interpolated, on each side by its staircase.

    `odd` are times with a number of channels in that doesn't go by blocks, at the most channels out: more than a block and no
    multiple of what a kernel takes at once, or less than a block.
    """

    times: Mapping[int, Mapping[int, float]]
    sides: tuple[Stairs, Stairs] = (Stairs(), Stairs())
    odd: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, points: Sequence[Sequence[int]], ms: Sequence[float], odd: int, sides: tuple[Stairs, Stairs]) -> Grid:
        """From measured points, of which the last `odd` are the odd ones."""
        on = len(points) - odd
        times: dict[int, dict[int, float]] = {}
        for (wide_in, wide_out), value in sorted(zip(map(tuple, points[:on]), ms[:on], strict=True)):
            times.setdefault(wide_in, {})[wide_out] = value
        rows = {wide_in: _ascending(row) for wide_in, row in times.items()}
        columns = {b: _ascending({a: row[b] for a, row in rows.items()}) for b in next(iter(rows.values()))}
        times = {a: {b: columns[b][a] for b in row} for a, row in rows.items()}
        beside = sorted(zip(map(tuple, points[on:]), ms[on:], strict=True))
        return cls(times, sides, {a: value for (a, _), value in beside})

    def ms(self, wide_in: int, wide_out: int) -> float:
        """Milliseconds at a size."""
        settled = tuple(self._settled(k, size) for k, size in enumerate((wide_in, wide_out)))
        found, step = self._on(*settled), self.sides[0].step
        if wide_out not in self._lines(1):
            found *= self.sides[1].share(wide_out)
        if wide_in in self.times:
            return found
        beside = {a: ms for a, ms in self.odd.items() if (a < step) == (wide_in < step)}
        if beside and (wide_in < step or not self.sides[0].by_blocks(wide_in)):
            slower = _line(beside, wide_in) / self._on(settled[0], max(self._lines(1)))
            return found * (
                slower if wide_in < step else max(slower, 1.0)
            )  # no other way beats that of the whole block
        return found * self.sides[0].share(wide_in)

    def _lines(self, side: int) -> Sequence[int]:
        return list(self.times) if side == 0 else list(next(iter(self.times.values())))

    def _settled(self, side: int, size: int) -> int:
        return size if size in self._lines(side) else self.sides[side].up(size)

    def _on(self, wide_in: int, wide_out: int) -> float:
        return _line({a: _line(row, wide_out) for a, row in self.times.items()}, wide_in)


@dataclass(frozen=True)
class Alone:
    """The same for an operator that has one width, each channel by itself."""

    times: Mapping[int, float]
    stairs: Stairs = Stairs()
    odd: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, times: Mapping[int, float], odd: Mapping[int, float], stairs: Stairs) -> Alone:
        """From measured times of whole blocks, and of what isn't."""
        return cls(_ascending(times), stairs, dict(sorted(odd.items())))

    def ms(self, wide_in: int, wide_out: int) -> float:
        if wide_in in self.times:
            return self.times[wide_in]
        if self.odd and not self.stairs.by_blocks(wide_in) and wide_in >= min(self.odd):
            return max(_line(self.odd, wide_in), _line(self.times, self.stairs.up(wide_in)))
        return _line(self.times, self.stairs.up(wide_in)) * self.stairs.share(wide_in)


def is_measured(value: float) -> bool:
    """Is it a time?"""
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
