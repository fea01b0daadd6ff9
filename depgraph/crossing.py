"""Finding the shortest beginning of a ranking that meets a target, in few evaluations."""

from __future__ import annotations

from collections.abc import Callable

_GUESSES = 12
Over = Callable[[int], float]


def crossing(over: Over, step: Over, ends: tuple[int, float, float], first: int | None = None) -> int:
    """A length at which `over` is at most 0, by less than `step` of it where that is found before all is narrowed down.

    `over(length)` says how far a beginning of that length is above the target, `step(length)` what its last item saves by
    itself, `ends` the whole length and `over` of nothing (above 0) and of all (at most 0). What is over falls nearly
    linearly, so a guess is where a line through the ends crosses 0 (the Illinois method: an end that stays counts half), and
    in the middle where that doesn't close in. `first` is tried first.
    """
    high, above, below = ends
    low, last = 0, 0.0
    for tries in range(high):
        if high - low <= 1:
            break
        share = above / (above - below) if tries < _GUESSES and above > below else 0.5
        guess = first if tries == 0 and first is not None else low + round((high - low) * share)
        guess = min(max(guess, low + 1), high - 1)
        found = over(guess)
        if found > 0:
            low, above, below = guess, found, below / 2 if last > 0 else below
        else:
            high, below, above = guess, found, above / 2 if last < 0 else above
            if -found < step(guess):
                break
        last = found
    return high
