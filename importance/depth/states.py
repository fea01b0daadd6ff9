"""Hidden states that runs begin from, within a budget of memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch.fx import Node

from importance.depth.programs import Names, State

Key = tuple[int, int, Names]
"""The number of a batch, a place in the graph, and what is left out before that."""


class States:
    """States by what they depend on, of at most `budget` bytes; memory that several share is counted once.

    When that is used up, those of the `base`, from which the next runs begin, take the place of others, and others aren't
    kept. What is missing costs time and changes no result.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held: dict[Key, State] = {}
        self.base: Names = frozenset()
        self.shares: Counter[int] = Counter()
        self.bytes = 0

    def get(self, key: Key, needs: frozenset[Node]) -> State | None:
        """The state of a key if it has all values that are needed."""
        state = self.held.get(key)
        return state if state is not None and needs <= state.keys() else None

    def put(self, key: Key, state: State) -> None:
        """Keep a state if there is room."""
        if key in self.held:
            return
        self._hold(key, state)
        if self.bytes > self.budget and key[2] <= self.base:
            for other in [k for k in self.held if not k[2] <= self.base]:
                self._drop(other)
                if self.bytes <= self.budget:
                    return
        if self.bytes > self.budget:
            self._drop(key)

    def keep_only(self, base: Names, before: dict[int, dict[int, Names]]) -> None:
        """From now on only supersets of `base` are run: drop what these can't begin from.

        `before` has, by batch and place, which of `base` lie before it.
        """
        self.base = base
        for key in [k for k in self.held if not k[2] >= before[k[0]][k[1]]]:
            self._drop(key)

    def _hold(self, key: Key, state: State) -> None:
        self.held[key] = state
        for pointer, size in _memory(state):
            self.bytes += 0 if self.shares[pointer] else size
            self.shares[pointer] += 1

    def _drop(self, key: Key) -> None:
        for pointer, size in _memory(self.held.pop(key)):
            self.shares[pointer] -= 1
            self.bytes -= 0 if self.shares[pointer] else size


def _memory(state: State) -> Iterator[tuple[int, int]]:
    """Where each tensor's memory lies, and its size in bytes."""
    for value in state.values():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            storage = value.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
