"""Which indices of a tensor a forward reads: those beyond a slice may be read with inputs of another size."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

_aten = torch.ops.aten
_SLICES = frozenset([_aten.slice.Tensor, _aten.narrow.default])


def indices_read(node: Node) -> list[np.ndarray]:
    """For each dim of a node's tensor, which indices its users read, as booleans: all but for what only slices leave out."""
    shape = tuple(node.meta["val"].shape)
    if not node.users or not all(user.target in _SLICES and user.args[0] is node for user in node.users):
        return [np.ones(int(size), dtype=bool) for size in shape]
    read = [np.zeros(int(size), dtype=bool) for size in shape]
    for user in node.users:
        d, picked = _picked(user, shape)
        for other, seen in enumerate(indices_read(user)):
            read[other][picked if other == d else slice(None)] |= seen
    return read


def _picked(node: Node, shape: tuple[int, ...]) -> tuple[int, slice]:
    """Along which dim a slice is taken, and what of it, at the sizes of the example."""
    given = dict(zip(("dim", "start", "end", "step"), map(_number, node.args[1:]), strict=False))
    d = (given.get("dim") or 0) % len(shape)
    start, end, size = given.get("start"), given.get("end"), int(shape[d])
    if node.target is _aten.narrow.default:
        start = (start or 0) % size
        end = start + (end or 0)
    return d, slice(*slice(start, end, given.get("step")).indices(size))


def _number(argument: object) -> int | None:
    made = argument.meta["val"] if isinstance(argument, Node) else argument
    return int(made) if isinstance(made, (int, torch.SymInt)) else None
