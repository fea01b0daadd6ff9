"""Which rows of a weight are left of what it makes, after what moves elements about: carried out on the rows' numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node

from depgraph.operators import aten_name

PARTS = frozenset(["slice", "select", "getitem", "index_select", "narrow"])
_STAYING = frozenset(["dropout", "to", "_to_copy", "type_as", "alias", "detach"])
_VIEWS = frozenset(["view", "_unsafe_view"])
LIKE = frozenset(
    ["view_as", "reshape_as", "expand_as", "type_as"]
)  # of a second tensor they take the shape or the type
ARRANGING = LIKE | {
    *(
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "contiguous",
        "clone",
    ),
    *("transpose", "permute", "movedim", "t", "numpy_T", "slice", "select", "narrow", "index_select"),
    *("split", "split_with_sizes", "chunk", "unbind", "to", "_to_copy", "alias", "detach", "dropout"),
}
"""Operators that lay numbers out otherwise, or leave some of them away."""


class Part(NamedTuple):
    """What `moves` leave of a parameter."""

    parameter: Node
    moves: list[Node]

    def rows(self, operand: Node, dim: int) -> tuple[int, np.ndarray] | None:
        """Which dim of the parameter, and which of its indices, lie along dimension `dim` of `operand`; None if that varies."""
        shape = tuple(self.parameter.meta["val"].shape)
        for d, size in enumerate(shape):
            numbers: Any = torch.arange(size).reshape([-1 if k == d else 1 for k in range(len(shape))]).expand(shape)
            for move in self.moves:
                numbers = move.target(numbers, *move.args[1:], **move.kwargs)  # type: ignore[operator]
            along = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
            if size > 1 and bool((along == along[:, :1]).all()) and len(along[:, 0].unique()) == len(along):
                return d, along[:, 0].numpy()
        return None


class Spread(NamedTuple):
    """The operand of an elementwise operator, broadcast to `shape`; `dim` is where a single dim of it lies."""

    shape: tuple[int, ...]
    dim: int

    @classmethod
    def over(cls, node: Node, dim: int = -1) -> Spread:
        return cls(tuple(node.meta["val"].shape), dim)

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        if numbers.ndim == 1 and self.dim >= 0:
            numbers = numbers.reshape([-1 if d == self.dim else 1 for d in range(len(self.shape))])
        return numbers.expand(self.shape)


Move = Node | Spread


def picks(moves: Sequence[Move]) -> bool:
    return any(isinstance(m, Node) and aten_name(m) in PARTS for m in moves)


def rows_left(node: Node, moves: Sequence[Move]) -> np.ndarray:
    """Which output features of a linear map are left after `moves`: they are carried out on the features' numbers."""
    shape = node.meta["val"].shape
    channels = 1 if aten_name(node).startswith("conv") else -1
    numbers: Any = torch.arange(shape[channels])
    numbers = numbers.reshape([-1 if d == channels % len(shape) else 1 for d in range(len(shape))]).expand(shape)
    return np.unique(moved(numbers, moves))


def moved(numbers: Any, moves: Sequence[Move]) -> np.ndarray:
    """The numbers that `moves` leave."""
    for move in moves:
        if isinstance(move, Spread):
            numbers = move(numbers)
            continue
        call: Callable[..., Any] = move.target  # type: ignore[assignment]
        if aten_name(move) in _STAYING:
            continue
        if aten_name(move) in LIKE:
            shape = tuple(move.meta["val"].shape)
            numbers = numbers.expand(shape) if aten_name(move) == "expand_as" else numbers.reshape(shape)
            continue
        if aten_name(move) in _VIEWS:  # numbers that were expanded have no strides to view them by
            call = torch.ops.aten.reshape.default
        numbers = call(*(numbers if isinstance(a, Node) else a for a in move.args), **move.kwargs)
    return numbers.numpy()
