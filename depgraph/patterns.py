"""Patterns that name axes: names of axes or of their parameters (shell wildcards), axes themselves, or callables."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from depgraph.axes import Axis
from depgraph.errors import PlanError

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Pattern = str | Axis | Callable[[Axis], bool]
_WILD = frozenset("*?[")


class Matcher:
    """Does any of some patterns name an axis, one of its members, or answer True to it? Sorted out once, asked often."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._names: set[str] = set()
        self._axes: set[str] = set()
        self._wild: list[re.Pattern[str]] = []
        self._asked: list[Callable[[Axis], bool]] = []
        for pattern in patterns:
            if isinstance(pattern, Axis):
                self._axes.add(pattern.name)
            elif not isinstance(pattern, str):
                self._asked.append(pattern)
            else:
                self._names.add(pattern)
                if not _WILD.isdisjoint(pattern):
                    self._wild.append(re.compile(fnmatch.translate(pattern)))

    @property
    def is_plain(self) -> bool:
        """Are there but names without wildcards?"""
        return not (self._wild or self._axes or self._asked)

    def __call__(self, axis: Axis) -> bool:
        names = _names(axis)
        if axis.name in self._axes or not self._names.isdisjoint(names):
            return True
        return any(p.match(n) for p in self._wild for n in names) or any(asked(axis) for asked in self._asked)


class Shares:
    """Numbers that are given by name patterns."""

    def __init__(self, given: Mapping[str, float]) -> None:
        self._plain: dict[str, tuple[int, float]] = {}
        self._wild: list[tuple[Matcher, tuple[int, float]]] = []
        for place, (pattern, share) in enumerate(given.items()):
            matcher = Matcher((pattern,))
            if matcher.is_plain:
                self._plain[pattern] = place, share
            else:
                self._wild.append((matcher, (place, share)))

    def of(self, axis: Axis) -> list[float]:
        """Those of the patterns that name an axis, in the order given."""
        found = {self._plain[name] for name in _names(axis) if name in self._plain}
        found.update(entry for matcher, entry in self._wild if matcher(axis))
        return [share for _, share in sorted(found)]


def listed(given: Any) -> tuple[Pattern, ...]:
    """One pattern or several as a tuple; raises PlanError for what is none."""
    if isinstance(given, (str, Axis)) or callable(given):
        return (given,)
    patterns = tuple(given) if isinstance(given, Iterable) else (given,)
    for pattern in patterns:
        if not (isinstance(pattern, (str, Axis)) or callable(pattern)):
            raise PlanError(f"{pattern!r} names no axis: protect and only take name patterns, axes or callables")
    return patterns


def unnamed(graph: DependencyGraph, patterns: Iterable[Pattern]) -> Iterator[str]:
    """Of those patterns that name no axis of a graph, and no parameter of one, the names: each is a slip."""
    known = {name for axis in graph.axes for name in _names(axis)}
    for pattern in patterns:
        if not isinstance(pattern, (str, Axis)):
            continue
        name = pattern if isinstance(pattern, str) else pattern.name
        if name not in known and not any(map(Matcher((pattern,)), graph.axes)):
            yield name


def _names(axis: Axis) -> tuple[str, ...]:
    return (axis.name, *(member.target for member in axis.members))
