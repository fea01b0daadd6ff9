"""Where cost falls in steps: after how many removed groups of an axis it is worth to stop.

Between two steps of a staircase a removal saves nothing (a convolution of 49 channels takes as long as one of 64, and often
longer), so a plan removes whole steps. Nothing is assumed of where they are: any function of the number of groups will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_AHEAD = 64  # groups to look ahead for what a removal could save at best
_WORTH = 0.8  # of the best saving per group within reach: a stop there is worth while
_LITTLE = 0.1  # of the mean saving per group: where no more is within reach, only the end is a stop
_NOTHING = 1e-9  # of the dense model, per group: rounding


def stops(gain: Callable[[int], float], counts: Sequence[int]) -> list[int]:
    """Those of `counts` (ascending numbers of removed groups, above 0) at which stopping pays.

    `gain(n)` is what the removal of the first n groups saves, and 0 groups save nothing. From each stop the next is the
    first count whose saving per group is at least 80% of the best within 64 groups, or, where nothing is saved so soon, of
    the best further on. Where every group saves the same, every count is a stop; where nothing is ever saved, none is.
    """
    saved = {0: 0.0, **{n: gain(n) for n in counts}}
    mean = max((saved[n] / n for n in counts), default=0.0)
    found, last, rest = [], 0, list(counts)
    while rest:
        ahead = [n for n in rest if n <= last + _AHEAD]
        if _best(saved, last, ahead) <= _NOTHING:
            ahead = rest
        rate = _best(saved, last, ahead)
        if rate <= _NOTHING:
            break
        if rate < _LITTLE * mean:
            ahead = [max(rest, key=lambda n: saved[n])]
            rate = _best(saved, last, ahead)
        last = next(n for n in ahead if _rate(saved, last, n) >= _WORTH * rate)
        found.append(last)
        rest = [n for n in rest if n > last]
    return found


def _rate(saved: dict[int, float], last: int, count: int) -> float:
    return (saved[count] - saved[last]) / (count - last)


def _best(saved: dict[int, float], last: int, counts: Sequence[int]) -> float:
    """The largest saving per group from one count to another."""
    return max((_rate(saved, last, n) for n in counts), default=0.0)
