"""The elements of a convolution's kernel as products of their own, where its windows aren't laid out as columns.

That is of three-dimensional and of transposed convolutions: their matrix has a row for each output and element of the kernel.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from depgraph.onnx_door.steps import Step
from depgraph.onnx_door.windows import moves_of_file
from depgraph.operators import argument, operator_name
from importance.patches import groups_of, padding_of, pair


class _Moves(NamedTuple):
    """How a convolution moves over space: for each dim of it steps, and what is padded before."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    transposed: bool


def taps_of(node: Any, source: tuple[int, ...], window: tuple[int, ...]) -> np.ndarray:
    """For each element of a kernel of sizes `window`: at what share of the places that the operator puts out it takes part, [elements].

    `source` is the shape of what comes in, sizes are those of the example. One 1 for what is no convolution.
    """
    if groups_of(node) is None or not window:
        return np.ones(1)
    moves, space = _moves(node, window), len(window)
    sizes = zip(window, source[-space:], tuple(node.meta["val"].shape)[-space:], strict=True)
    return reduce(np.multiply.outer, [_shares(moves, dim, *each) for dim, each in enumerate(sizes)]).reshape(-1)


def _shares(moves: _Moves, dim: int, window: int, size: int, made: int) -> np.ndarray:
    """The same along one dim of space."""
    steps, limit = (size, made) if moves.transposed else (made, size)
    places = (
        np.arange(steps) * moves.stride[dim] - moves.padding[dim] + np.arange(window)[:, None] * moves.dilation[dim]
    )
    found: np.ndarray = ((places >= 0) & (places < limit)).sum(axis=1) / made
    return found


def _moves(node: Any, window: tuple[int, ...]) -> _Moves:
    if isinstance(node, Step):
        return _Moves(*moves_of_file(node, len(window)))
    stride, dilation = (pair(argument(node, name, 1), len(window)) for name in ("stride", "dilation"))
    before = tuple(n for n, _ in padding_of(argument(node, "padding", 0), window, dilation))
    return _Moves(stride, dilation, before, "transpose" in operator_name(node.target))
