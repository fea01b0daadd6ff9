"""Which operators a cut has to do with, found without looking at all of them: a cut of one axis reaches few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set


class Touches:
    """The operators of a graph by the axes that reach what they read or make.

    `axes` has the names of these for each operator, in order of execution; the operators in `always` have to do with any cut.
    """

    def __init__(self, axes: Mapping[str, Iterable[str]], always: Set[str]) -> None:
        self._operators = list(axes)
        self._always = [place for place, name in enumerate(axes) if name in always]
        self._of_axis: dict[str, list[int]] = defaultdict(list)
        for place, reaching in enumerate(axes.values()):
            for axis in reaching:
                self._of_axis[axis].append(place)

    def by(self, axes: Iterable[str]) -> list[str]:
        """The operators that a cut of these axes has to do with, in order of execution."""
        places = set(self._always).union(*(self._of_axis.get(axis, ()) for axis in axes))
        return [self._operators[place] for place in sorted(places)]
