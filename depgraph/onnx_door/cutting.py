"""The cut: stored tensors sliced, size operands and attributes rewritten, everything else as it was.

The copy of the model is gone through with its new shapes, an operator at a time; each is mended before its results are
looked at, and every shape must come out as the graph predicts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from depgraph.errors import CaptureError, CutError
from depgraph.graph import Value
from depgraph.onnx_door.arrays import read_array, taken
from depgraph.onnx_door.copies import Cut, hold, home, register
from depgraph.onnx_door.evaluating import Evaluator, place
from depgraph.onnx_door.folding import sizes_of
from depgraph.onnx_door.mending import Mending
from depgraph.onnx_door.operands import settings, stored
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph

Indices = tuple[np.ndarray | None, ...]
"""Kept indices of each dim, None for all."""


def cut_model(graph: OnnxGraph, kept: Kept) -> Cut:
    """A cut copy of the graph's model.

    Raises CutError where a size can't follow, or shapes don't come out as predicted.
    """
    made = Cut.copy(graph.model)
    _slice_stored(graph, made, kept)
    mending = Mending(graph, made, kept)
    try:
        after = Evaluator(made.model, graph.inputs_at(kept), mending.measured(), mending.before)
    except CaptureError as error:
        raise CutError(f"{graph.name} can't be cut so: {error}") from error
    made.compared = _compare(graph, made, kept, after)
    _declare(graph, made, kept)
    return made


def _slice_stored(graph: OnnxGraph, made: Cut, kept: Kept) -> None:
    """Slice what the file holds; where its users want it cut in several ways, the others get a copy of their own."""
    lowered, new = graph.capture.lowered, made.new()
    twins = {old: twin for twin, old in made.nodes.items()}
    for value in dict.fromkeys(lowered.held.values()):
        tensor = stored(value)
        if tensor is None:
            continue
        ways: dict[bytes, tuple[Indices, list[tuple[ir.Node, int]]]] = {}
        for node, position in value.uses():
            seen = None if position in settings(node) else lowered.operand(node, position)
            indices = (None,) * len(tensor.shape) if seen is None else _indices(seen, kept)
            ways.setdefault(_key(indices), (indices, []))[1].append((twins[node], position))
        usual, *others = sorted(ways.values(), key=lambda way: -len(way[1])) or [((), [])]
        if any(i is not None for i in usual[0]):
            hold(new[value], sliced(tensor, usual[0]))
        for k, (indices, uses) in enumerate(others, start=1):
            other = _held(sliced(tensor, indices, name=f"{value.name}_{k}"))
            register(home(new[value]), other, made.model)
            for node, position in uses:
                node.replace_input_with(position, other)


def _held(tensor: ir.LazyTensor) -> ir.Value:
    """A value with these numbers, called as the tensor is."""
    return ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
    )


def _indices(value: Value, kept: Kept) -> Indices:
    return tuple(kept.of(value, d) for d in range(len(value.shape)))


def _key(indices: Indices) -> bytes:
    return b"|".join(b"" if i is None else i.tobytes() for i in indices)


def sliced(tensor: ir.TensorProtocol, indices: Indices, name: str | None = None) -> ir.LazyTensor:
    """The kept part of a tensor, read when it is written out."""
    shape = [d if i is None else len(i) for d, i in zip(sizes_of(tensor), indices, strict=True)]

    def read() -> ir.TensorProtocol:
        array = np.ascontiguousarray(taken(read_array(tensor), indices))
        return ir.Tensor(array, dtype=tensor.dtype, name=name or tensor.name)

    return ir.LazyTensor(
        read, dtype=tensor.dtype, shape=ir.Shape(shape), name=name or tensor.name, doc_string=tensor.doc_string
    )


def _compare(graph: OnnxGraph, made: Cut, kept: Kept, after: Evaluator) -> int:
    """How many values have the predicted shape; raises CutError for the first that hasn't."""
    seen = graph.capture.lowered.values
    count = 0
    for new, old in made.values.items():
        value, shape = seen.get(old), after.shape(new)
        if value is None or shape is None:
            continue
        producer = new.producer()
        if shape != kept.shape(value) and stored(old) is None:
            where = place(producer) if producer is not None else "the graph"
            raise CutError(
                f"{where} would make {new.name!r} of shape {shape} after the cut, predicted was {kept.shape(value)}"
            )
        count += 1
    return count


def _declare(graph: OnnxGraph, made: Cut, kept: Kept) -> None:
    """Declared shapes follow; sizes that nothing cuts stay as they are written."""
    seen = graph.capture.lowered.values
    for new, old in made.values.items():
        value = seen.get(old)
        if value is None or old.shape is None or stored(old) is not None or len(old.shape) != len(value.shape):
            continue
        dims = [kept.size(value.dim(d)) if kept.of(value, d) is not None else size for d, size in enumerate(old.shape)]
        if any(kept.of(value, d) is not None for d in range(len(dims))):
            new.shape = ir.Shape(dims)
