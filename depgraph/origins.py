"""Which dims of a program's inputs a dim comes from: what says where the samples and the tokens of a batch are in any value."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from depgraph.graph import Program

Given = frozenset[tuple[int, int]]
"""Dims of inputs: the number of the input among the leaves of a call, and the dim of it."""


class Factor(NamedTuple):
    """A dim, or one of the dims that were laid out as one: its size, and the dims of inputs that it is aligned with."""

    size: int
    given: Given


Factors = tuple[Factor, ...]
"""The factors of a dim, the outermost first."""

NOWHERE: Given = frozenset()


class Origins:
    """Where the dims of a program's values come from; `inputs` names the leaves of a call, in their order."""

    def __init__(self, program: Program, inputs: Sequence[str]) -> None:
        self.program = program
        self.inputs = inputs
        self._known: dict[str, tuple[Factors, ...]] = {}

    @cached_property
    def _given(self) -> dict[int, Given]:
        """The dims of inputs by the representatives of their classes."""
        found: dict[int, Given] = {}
        for number, name in enumerate(self.inputs):
            value = self.program.values.get(name)
            for dim, at in enumerate(value.dims if value is not None else ()):
                key = self.program.relations.find(at)
                found[key] = found.get(key, NOWHERE) | {(number, dim)}
        return found

    @cached_property
    def _folds(self) -> dict[int, tuple[int, ...]]:
        """The dims that were laid out as one, where one of them comes from an input."""
        find, found = self.program.relations.find, dict[int, tuple[int, ...]]()
        for fold in self.program.relations.folds:
            if any(find(part) in self._given for part in fold.parts):
                found.setdefault(find(fold.flat), fold.parts)
        return found

    def of(self, name: str) -> tuple[Factors, ...]:
        """The factors of each dim of a value."""
        if name not in self._known:
            self._known[name] = tuple(self._factors(at) for at in self.program.values[name].dims)
        return self._known[name]

    def _factors(self, at: int) -> Factors:
        relations = self.program.relations
        key = relations.find(at)
        parts = (at,) if key in self._given else self._folds.get(key, (at,))
        return tuple(Factor(relations.sizes[p], self._given.get(relations.find(p), NOWHERE)) for p in parts)
