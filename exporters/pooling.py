"""Pooling to a size: windows that differ by a place and may overlap, where the size asked for doesn't divide what comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import onnx_ir
from onnxscript import opset18 as op

_Spans = list[tuple[int, int]]


def adaptive_mean(self: Any, output_size: Sequence[int]) -> Any:
    """[..., space] -> [..., output_size]: a mean over a window is one over each of its dims."""
    spans = _spans(self, output_size)
    for d, along in enumerate(spans):
        dim = d - len(spans)
        parts = [op.ReduceMean(_part(self, [span], [dim]), [dim], keepdims=1) for span in along]
        self = op.Concat(*parts, axis=dim)
    return self


def adaptive_max(self: Any, output_size: Sequence[int]) -> tuple[Any, Any]:
    """[..., space] -> twice [..., output_size]: the largest of every window, and where it lies among all places."""
    spans = _spans(self, output_size)
    space, dims = self.shape[-len(spans) :], list(range(-len(spans), 0))
    outer = [0] * (len(self.shape) - len(spans))
    largest, places = [], []
    for window in product(*spans):
        row = op.Reshape(_part(self, window, dims), [*outer, -1])
        largest.append(op.ReduceMax(row, [-1], keepdims=1))
        places.append(_among_all(op.ArgMax(row, axis=-1, keepdims=1), window, space))
    made = [*outer, *output_size]
    return tuple(op.Reshape(op.Concat(*found, axis=-1), made) for found in (largest, places))


def _spans(source: Any, output_size: Sequence[int]) -> list[_Spans]:
    """Where the windows begin and end along every dim of space, as torch lays them."""
    space = source.shape[-len(output_size) :]
    if not all(isinstance(size, int) for size in space):
        raise ValueError("what is pooled to a size is of a free size")
    return [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(space, output_size, strict=True)]


def _part(source: Any, window: Sequence[tuple[int, int]], dims: list[int]) -> Any:
    return op.Slice(source, [start for start, _ in window], [end for _, end in window], dims)


def _among_all(place: Any, window: Sequence[tuple[int, int]], space: Sequence[int]) -> Any:
    """The place in a window as one among all places, both counted row by row."""
    found, inside, outside = None, 1, 1
    for (start, end), size in zip(reversed(window), reversed(space), strict=True):
        here = op.Mod(op.Div(place, _number(inside)), _number(end - start))
        moved = op.Mul(op.Add(here, _number(start)), _number(outside))
        found = moved if found is None else op.Add(found, moved)
        inside, outside = inside * (end - start), outside * size
    return found


def _number(value: int) -> Any:
    return op.Constant(value=onnx_ir.tensor([value], dtype=onnx_ir.DataType.INT64))


def table(aten: Any) -> dict[Any, Callable[..., Any]]:
    """Translations by operator."""
    found = {aten.adaptive_max_pool2d.default: adaptive_max, aten.adaptive_max_pool3d.default: adaptive_max}
    return found | {aten._adaptive_avg_pool3d.default: adaptive_mean}
