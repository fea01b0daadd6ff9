"""Example inputs for an ONNX model: those given, or made up in sizes and numbers that it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from depgraph.errors import CaptureError
from depgraph.onnx_door.folding import is_closed
from depgraph.onnx_door.operands import stored

Arrays = dict[str, np.ndarray]
Sizes = Mapping[str, int]
_SPACE = (224, 256, 320, 640, 64, 512, 32, 96)  # of images: height and width
_COLOURS = 4  # as many channels at most has an image whose channels come last
_STEPS = (16, 512, 7, 1, 128, 16000, 1600)  # of sequences and signals


def runtime_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that must be given: those that aren't initializers too."""
    held = set(model.graph.initializers)
    return [value for value in model.graph.inputs if value.name not in held]


def given_inputs(model: ir.Model, args: Any, kwargs: Mapping[str, Any]) -> Arrays | None:
    """Inputs as arrays by name; None where none are given. Raises CaptureError where they don't fit the file."""
    wanted = runtime_inputs(model)
    by_name: dict[str, Any] = dict(kwargs)
    if isinstance(args, Mapping):
        by_name |= args
    else:
        listed = args if isinstance(args, (tuple, list)) else (args,)
        if len(listed) > len(wanted):
            raise CaptureError(f"{len(listed)} inputs are given, the file takes {len(wanted)}: {_names(wanted)}")
        by_name |= {str(v.name): a for v, a in zip(wanted, listed, strict=False)}
    if not by_name:
        return None
    names = {str(v.name) for v in wanted}
    for name in by_name:
        if name not in names:
            raise CaptureError(f"the file has no input {name!r}; it takes {_names(wanted)}")
    for value in wanted:
        if value.name not in by_name:
            raise CaptureError(f"input {value.name!r} is missing: the file takes {_names(wanted)}")
    return {str(v.name): _fitting(v, by_name[str(v.name)]) for v in wanted}


def _names(values: Sequence[ir.Value]) -> str:
    return ", ".join(repr(v.name) for v in values) or "none"


def _fitting(value: ir.Value, given: Any) -> np.ndarray:
    array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    wanted = dtype_of(value)
    if array.dtype != wanted:
        if array.dtype.kind != np.dtype(wanted).kind:
            raise CaptureError(f"input {value.name!r} holds {array.dtype} where the file wants {wanted}")
        array = array.astype(wanted)
    shape = value.shape
    if shape is not None:
        fits = len(shape) == array.ndim and all(
            not isinstance(d, int) or d in (n, -1, 0) for d, n in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise CaptureError(f"input {value.name!r} has shape {array.shape} where the file wants {shape}")
    return np.ascontiguousarray(array).reshape(array.shape)


def dtype_of(value: ir.Value) -> np.dtype:
    """The numpy type of an input; raises CaptureError where it isn't a tensor."""
    if value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise CaptureError(f"input {value.name!r} is no tensor: give the model with tensors as inputs")
    return np.dtype(value.dtype.numpy())


def is_dynamic(model: ir.Model) -> bool:
    """Does the file leave a size of an input open?"""
    return not all(is_closed(v.shape) for v in runtime_inputs(model))


def made_up(model: ir.Model, sizes: Sizes, seed: int) -> Iterator[Arrays]:
    """Inputs in one choice of open sizes after the other; `sizes` fixes some, by the name of the dim or ``input:dim``.

    Floats are normal. Integers that index a table are drawn from its rows, those that are compared with a number of the file
    are that number; others are ones, as masks and lengths have.
    """
    generator = np.random.default_rng(seed)
    inputs = runtime_inputs(model)
    for value in inputs:
        if value.shape is None:
            raise CaptureError(f"the file doesn't say what shape its input {value.name!r} has: give an example input")
    _require_open(inputs, sizes)
    likely = {str(v.name): _likely(v) for v in inputs}
    leading = (_first_dims(inputs), _first_dims(inputs) | _first_open_dims(inputs))
    seen = set()
    for first, batch, k in itertools.product(leading, (2, 1), range(max(len(_SPACE), len(_STEPS)))):
        shapes = {str(v.name): _shape(v, {**dict.fromkeys(first, batch), **sizes}, k) for v in inputs}
        key = tuple(shapes.values())
        if key not in seen:
            seen.add(key)
            yield {str(v.name): _filled(v, shapes[str(v.name)], likely[str(v.name)], generator) for v in inputs}


def _first_dims(inputs: Sequence[ir.Value]) -> set[str]:
    """What is a batch nearly always: dims that stand first."""
    return {_symbol(v, 0) for v in inputs if v.shape is not None and len(v.shape) > 1}


def _first_open_dims(inputs: Sequence[ir.Value]) -> set[str]:
    """What is a batch in states, whose first dim counts layers: the first dim of an input that is left open."""
    first = ((v, [d for d in range(len(v.shape or ())) if _is_open(v, d)]) for v in inputs)
    return {_symbol(v, dims[0]) for v, dims in first if dims}


def _is_open(value: ir.Value, d: int) -> bool:
    size = (value.shape or ())[d]
    return not isinstance(size, int) or size < 1


def _require_open(inputs: Sequence[ir.Value], sizes: Sizes) -> None:
    """Raise CaptureError for a size below 0, or that the file doesn't leave open under that name."""
    dims = [(v, d) for v in inputs for d in range(len(v.shape or ())) if _is_open(v, d)]
    known = dict.fromkeys(_symbol(v, d) for v, d in dims)
    for name, size in sizes.items():
        if size < 0:  # none is a size too: a cache is empty at first
            raise CaptureError(f"the open size {name!r} can't be {size}: give a whole number, 0 or more")
        if name not in known and name not in {f"{v.name}:{d}" for v, d in dims}:
            there = f"it leaves open {', '.join(map(repr, known))}" if known else "it leaves none open"
            raise CaptureError(f"the file has no open size {name!r}: {there}")


def _symbol(value: ir.Value, d: int) -> str:
    """The name of an open dim: dims of one name have one size."""
    size = value.shape[d]  # type: ignore[index]
    return str(size.value) if isinstance(size, ir.SymbolicDim) and size.value else f"{value.name}:{d}"


def _shape(value: ir.Value, sizes: Sizes, k: int) -> tuple[int, ...]:
    assert value.shape is not None
    image = len(value.shape) >= 4 and dtype_of(value).kind == "f"
    last = value.shape[-1] if image else None
    channels = -1 if isinstance(last, int) and 0 < last <= _COLOURS else 1
    guesses = _SPACE if image else _STEPS
    shape = []
    for d, size in enumerate(value.shape):
        fixed = sizes.get(f"{value.name}:{d}", sizes.get(_symbol(value, d)))
        if isinstance(size, int) and not _is_open(value, d):
            shape.append(size)
        elif fixed is not None:
            shape.append(int(fixed))
        else:
            shape.append(3 if image and d == channels else guesses[min(k, len(guesses) - 1)])
    return tuple(shape)


def tables(model: ir.Model) -> dict[str, int]:
    """How many rows the smallest table has that the numbers of an input point into, for inputs that point into one."""
    found = {str(value.name): _rows(value) for value in runtime_inputs(model)}
    return {name: rows for name, rows in found.items() if rows is not None}


_TABLES = {"Gather": 0, "EmbedLayerNormalization": 2}
_PASSES = frozenset(["Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Add", "Sub"])


def _rows(value: ir.Value) -> int | None:
    """How many rows the smallest table has that the numbers of an input point into; None where they point into none."""
    readers = [(node, at) for node, at in _readers(value) if node.op_type in _TABLES and at != _TABLES[node.op_type]]
    return min((rows for node, _ in readers for rows in _size_of_table(node)), default=None)


def _likely(value: ir.Value) -> range | None:
    """The integers to draw from for an input that says by its number what is looked up or done; None for any other."""
    if (rows := _rows(value)) is not None:
        return range(rows)
    for node, at in _readers(value):
        other = node.inputs[1 - at] if node.op_type == "Equal" else None
        held = None if other is None else stored(other)
        if held is not None and held.size == 1:
            number = int(held.numpy().item())
            return range(number, number + 1)
    return None


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The operators that read a value, or its numbers in another form, and at which operand."""
    queue, seen = [value], {value}
    while queue:
        for node, position in queue.pop().uses():
            yield node, position
            if node.op_type in _PASSES:
                queue += [v for v in node.outputs if v not in seen]
                seen.update(node.outputs)


def _size_of_table(node: ir.Node) -> list[int]:
    """The rows that an operator looks up in, where the file says how many."""
    table = node.inputs[_TABLES[node.op_type]]
    axis = int(node.attributes["axis"].value) if "axis" in node.attributes else 0
    held = None if table is None else table.const_value if table.const_value is not None else table
    size = None if held is None or held.shape is None else held.shape[axis]
    return [size] if isinstance(size, int) else []


def _filled(
    value: ir.Value, shape: tuple[int, ...], likely: range | None, generator: np.random.Generator
) -> np.ndarray:
    dtype = dtype_of(value)
    if dtype.kind == "f":
        return np.asarray(generator.standard_normal(shape)).astype(dtype)
    if dtype.kind in "iu" and likely is not None:
        return np.asarray(generator.integers(likely.start, likely.stop, shape)).astype(dtype)
    return np.ones(shape, dtype=dtype)


def open_dims(inputs: Sequence[ir.Value]) -> dict[str, str]:
    """The dims that inputs leave open: ``input:dim`` -> the dim's name, which `made_up` takes sizes by too."""
    dims = [(v, d) for v in inputs for d in range(len(v.shape or ())) if _is_open(v, d)]
    return {f"{v.name}:{d}": _symbol(v, d) for v, d in dims}


def declared_shapes(model: ir.Model, inputs: Arrays, values: Sequence[ir.Value]) -> dict[str, tuple[int, ...]]:
    """Shapes of values that the file declares with sizes by names that the inputs' sizes have, too."""
    named = {
        _symbol(value, d): size
        for value in runtime_inputs(model)
        if value.name in inputs
        for d, size in enumerate(inputs[str(value.name)].shape)
        if _is_open(value, d)
    }
    found = {}
    for value in values:
        sizes: list[Any] = [
            named.get(_symbol(value, d)) if _is_open(value, d) else size for d, size in enumerate(value.shape or ())
        ]
        if value.shape is not None and all(isinstance(size, int) for size in sizes):
            found[str(value.name)] = tuple(sizes)
    return found
