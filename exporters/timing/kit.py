"""A kit: what a device needs to measure one model, in a folder of small files and one script.

dense.onnx has the model's operators and sizes without its weights (ONNX Runtime makes tensors of equal values when it loads
it), narrow.onnx the same at half of the widths, the micro models have its operators at other widths, and measure.py times them all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from depgraph.errors import ExportError
from depgraph.onnx_door.graph import OnnxGraph
from exporters.onnx_file import writing
from exporters.timing import measure
from exporters.timing.micro import Point, Signature, micro_model
from exporters.timing.narrow import halved, narrow_model
from exporters.timing.operators import Operators

SCRIPT, FORMAT = "measure.py", measure.FORMAT
NARROW = {"narrow": "narrow.onnx", "narrow inputs": "narrow.npz"}
STAIRS = {
    "conv.in": "stairs of channels in",
    "conv.out": "stairs of channels out",
    "depthwise": "stairs of channels alone",
    "matmul.out": "stairs of columns",
}
_BLOCK = 16  # grids lie on multiples of it, which are multiples of every smaller step too
_SHARES = ((1, 3 / 4, 1 / 2, 1 / 4, 1 / 8), (1, 1 / 2, 1 / 4), (1, 1 / 2))
_MOST_DENSE = 4  # of the model's own widths in a grid
_MOST_WEIGHTS = 60_000_000  # in one micro model
_LONG = 20_000_000  # multiply-accumulates: an operator with more is measured in a model of its own
_BELOW = (4, 8, 12)  # channels in that are less than a block: another kernel takes them
_LARGE = 4096  # elements of a stored tensor that isn't kept as it is
_PROBE = Signature("conv", 1, (14, 14), (("kernel_shape", (3, 3)), ("pads", (1, 1, 1, 1))))
_PROBED = (*range(2, 16, 2), *range(16, 33, 4), *range(33, 65), *range(68, 97, 4))
_PROBED_BESIDE = 64
_MOST_ROWS = 256


def write_kit(graph: OnnxGraph, folder: str | os.PathLike[str]) -> Path:
    """Write the kit of a traced ONNX model into a new folder.

    Raises ExportError when the folder can't be written, or holds something.
    """
    path = Path(folder)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ExportError(f"{path} isn't empty: give a new folder for the kit")
    operators = Operators(graph)
    with writing(path):
        ir.save(skeleton(graph.model), path / "dense.onnx")
        if (narrow := narrow_model(graph)) is not None:
            ir.save(skeleton(narrow, places(graph.model)), path / NARROW["narrow"])
            _save(path / NARROW["narrow inputs"], graph.inputs_at(halved(graph)))
        _save(path / "inputs.npz", graph.inputs)
        entries = [_written(path, k, *planned) for k, planned in enumerate(_planned(operators))]
        about: dict[str, Any] = {"format": FORMAT, "model": graph.name, "fingerprint": fingerprint(graph)}
        about |= {"dense": "dense.onnx", "inputs": "inputs.npz", "micro": entries}
        about |= NARROW if narrow is not None else {}
        (path / "kit.json").write_text(json.dumps(about, indent=1) + "\n")
        shutil.copyfile(str(measure.__file__), path / SCRIPT)
    return path


def _save(path: Path, inputs: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in inputs.items()}
    np.savez(path, **arrays)


def key_of(signature: Signature) -> str:
    """The name of a signature in kits and profiles."""
    settings = " ".join(f"{name}={_text(value)}" for name, value in signature.settings)
    return f"{signature.kind} {signature.batch}x{_text(signature.space)} {settings}".strip()


def fingerprint(graph: OnnxGraph) -> str:
    """What a profile must have in common with a model: operators, their order, and sizes; not the weights."""
    values = graph.capture.program.values
    lines = [f"{name} {array.shape} {array.dtype}" for name, array in sorted(graph.inputs.items())]
    lines += [f"{v.kind} {v.shape}" for v in values.values() if v.kind in ("parameter", "buffer")]
    lines += [f"{node.domain} {node.op_type} {len(node.inputs)} {len(node.outputs)}" for node in graph.model.graph]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def places(model: ir.Model) -> dict[str, int]:
    """The position of every operator by the name of its first output."""
    return {str(node.outputs[0].name): position for position, node in enumerate(model.graph)}


def skeleton(model: ir.Model, known: Mapping[str, int] | None = None) -> ir.Model:
    """The model with operators named n0, n1, ... in their order, and large stored tensors made of one value each.

    `known` are the `places` of the model that it was cut from, whose operators have the same names here; those that the cut added
    come behind.
    """
    made = model.clone()
    graph = made.graph
    own = places(model) if known is None else known
    added = count(len(own))
    for node in graph:
        position = own[name] if (name := str(node.outputs[0].name)) in own else next(added)
        node.name = f"n{position}"
        for k, value in enumerate(node.outputs):
            value.name = f"n{position}" if k == 0 else f"n{position}_{k}"
    first = next(iter(graph))
    for position, value in enumerate([*graph.initializers.values()]):
        value.name = f"w{position}"
        if value.const_value is not None and _is_replaceable(value.const_value):
            _replace(graph, value, first, position)
    return made


def _is_replaceable(tensor: Any) -> bool:
    floats = tensor.dtype.is_floating_point() or tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
    return bool(floats and math.prod(tensor.shape.numpy()) > _LARGE)


def _replace(graph: ir.Graph, value: ir.Value, first: ir.Node, position: int) -> None:
    """Make a stored tensor by ConstantOfShape.

    Each has a value of its own, as ONNX Runtime computes only once what several operators make of equal tensors and one input:
    queries, keys and values would be one product.
    """
    tensor: Any = value.const_value
    shape = ir.Value(name=f"{value.name}_shape", const_value=ir.tensor(np.array(tensor.shape.numpy(), np.int64)))
    graph.register_initializer(shape)
    kind = tensor.dtype.numpy()
    fill = 1 / math.sqrt(max(math.prod(tensor.shape.numpy()[1:]), 1)) / (1 + position / 100)
    fill = 1 + position % 100 if kind in (np.int8, np.uint8) else fill
    number = ir.tensor(np.array([fill]).astype(kind), dtype=tensor.dtype)
    node = ir.Node("", "ConstantOfShape", [shape], [ir.AttrTensor("value", number)])
    node.outputs[0].name = f"{value.name}_made"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.insert_before(first, node)
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    del graph.initializers[str(value.name)]


def _planned(operators: Operators) -> list[tuple[str, Signature, list[Point], int]]:
    """What is measured: name, signature, points, and how many of these, the last ones, have an odd number of channels in."""
    found, kinds = [], set()
    for signature, widths in operators.signatures.items():
        points, odd = _points(signature, widths)
        found.append((key_of(signature), signature, [*points, *odd], len(odd)))
        kinds.add(signature.kind)
    probes: list[tuple[str, Signature, list[Point], int]] = []
    if kinds & {"conv", "depthwise"}:
        probes.append((STAIRS["conv.in"], _PROBE, [(c, _PROBED_BESIDE) for c in _PROBED], 0))
        probes.append((STAIRS["conv.out"], _PROBE, [(_PROBED_BESIDE, c) for c in _PROBED], 0))
    rows = max((s.space[0] for s in operators.signatures if s.kind == "matmul"), default=1)
    if rows >= _BLOCK:
        columns = Signature("matmul", 1, (min(rows, _MOST_ROWS),))
        probes.append((STAIRS["matmul.out"], columns, [(_MOST_ROWS, c) for c in _PROBED], 0))
    if "depthwise" in kinds:
        alone = Signature("depthwise", 1, (56, 56), _PROBE.settings)
        probes.append((STAIRS["depthwise"], alone, [(c, c) for c in _PROBED], 0))
    return [*probes, *found]


def _points(signature: Signature, widths: list[Point]) -> tuple[list[Point], list[Point]]:
    """A grid of widths, and points beside it that other kernels take: an odd number of channels in, or less than a block."""
    units = (1 if signature.kind == "matmul" else _BLOCK, _BLOCK)
    unit = units[0]
    wide_in, wide_out = ({point[k] for point in widths} for k in (0, 1))
    if signature.kind == "depthwise":
        grid = _grid(wide_in, unit, _SHARES[0])
        return [(c, c) for c in grid], [(c - 1, c - 1) for c in grid if c > unit]
    points: list[Point] = []
    for shares in _SHARES:
        lines = _grid(wide_in, units[0], shares), _grid(wide_out, units[1], shares)
        points = [(a, b) for a in lines[0] for b in lines[1]]
        if sum(a * b for a, b in points) <= _MOST_WEIGHTS:
            break
    if signature.kind != "conv" or max(wide_in) <= unit:
        return points, []
    beside = [*_BELOW, *(a - 1 for a in lines[0] if a >= unit)]
    return points, [(a, max(lines[1])) for a in beside]


def _grid(widths: set[int], unit: int, shares: tuple[float, ...]) -> list[int]:
    """Multiples of `unit` up to the widest, and some of the widths themselves, ascending."""
    most = max(widths)
    found = {math.ceil(most * share / unit) * unit for share in shares} if most > unit else {most}
    own = sorted({math.ceil(width / unit) * unit if width > unit else width for width in widths})
    chosen = {own[k * (len(own) - 1) // max(_MOST_DENSE - 1, 1)] for k in range(_MOST_DENSE)}
    return sorted(found | chosen)


def _written(
    folder: Path, number: int, key: str, signature: Signature, points: list[Point], odd: int
) -> dict[str, Any]:
    """One micro model of all points that are short, and one of its own for each that isn't, by its place in `alone`."""
    file, alone = f"micro{number}.onnx", [k for k, point in enumerate(points) if signature.work(point) > _LONG]
    onnx.save(micro_model(signature, points, [k for k in range(len(points)) if k not in alone]), folder / file)
    about = {"key": key, "file": file, "input": signature.shape, "points": points, "odd": odd, "alone": alone}
    if alone:
        models = {f"n{k}": micro_model(signature, points, [k]).SerializeToString() for k in alone}
        packed: dict[str, Any] = {name: np.frombuffer(model, np.uint8) for name, model in models.items()}
        np.savez_compressed(folder / f"micro{number}.npz", **packed)
    return about


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
