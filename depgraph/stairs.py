"""Where cost falls in steps: after how many removed groups of an axis it is worth to stop.

Between two steps of a staircase a removal saves nothing (a convolution of 49 channels takes as long as one of 64, and often
longer), so a plan removes whole steps. Nothing is assumed of where they are: any function of the number of groups will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_AHEAD = 64  # groups to look ahead for what a removal could save at best
_WORTH = 0.8  # of the best saving per group within reach: a stop there is worth while
_NOTHING = 1e-9  # of the dense model, per group: rounding


def stops(gain: Callable[[int], float], counts: Sequence[int]) -> list[int]:
    """Those of `counts` (ascending numbers of removed groups, above 0) at which stopping pays.

    `gain(n)` is what the removal of the first n groups saves, and 0 groups save nothing. From each stop the next is the
    first count whose saving per group is at least 80% of the best within 64 groups, or, where nothing is saved so soon, of
    the best further on. Where every group saves the same, every count is a stop; where nothing is ever saved, none is.
    """
    saved = {n: gain(n) for n in counts}
    found, last, base, k = [], 0, 0.0, 0
    while k < len(counts):
        ahead = [n for n in counts[k:] if n <= last + _AHEAD] or [counts[k]]
        rate = max((saved[n] - base) / (n - last) for n in ahead)
        if rate <= _NOTHING:
            ahead = list(counts[k:])
            rate = max((saved[n] - base) / (n - last) for n in ahead)
        if rate <= _NOTHING:
            break
        last = next(n for n in ahead if (saved[n] - base) / (n - last) >= _WORTH * rate)
        base = saved[last]
        found.append(last)
        k += ahead.index(last) + 1
    return found
