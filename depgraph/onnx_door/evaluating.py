"""Shapes of all values of an ONNX model at example sizes, and the numbers of those that shapes are computed from.

Operators are gone through in order, bodies of `If`, `Loop` and `Scan` included. An operator whose operands are all small
and known is carried out, so that chains of Shape, Gather, Concat or Range end in numbers; any other is asked for the shapes
of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from depgraph.errors import CaptureError
from depgraph.onnx_door.folding import (
    Known,
    Type,
    carried_out,
    inferred,
    is_closed,
    is_small,
    schema_of,
    shape_of,
    sizes_of,
    tensor_type,
)
from depgraph.onnx_door.fused_shapes import FUSED

Before = Callable[["Evaluator", ir.Node], None]
_SCANS_AS_NOW = 9
BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}


class Evaluator:
    """What is known of every value: its type with all sizes, and its numbers where they are few.

    `measured` gives shapes that only running the model tells, by name. `before` is called with every operator before it
    is looked at, and may change it. `declared` are the names of values whose shape only the file tells, `failed` has the
    bodies of control flow that don't fit the example and why, `taken` the branch of each `If` whose condition is known.
    """

    def __init__(
        self,
        model: ir.Model,
        inputs: Mapping[str, Known],
        measured: Mapping[str, tuple[int, ...]] | None = None,
        before: Before | None = None,
    ) -> None:
        self.model = model
        self.before = before
        self.measured = measured or {}
        self.types: dict[ir.Value, Type] = {}
        self.known: dict[ir.Value, Known] = {}
        self.open: list[ir.Value] = []
        self.declared: set[str] = set()
        self.failed: dict[ir.Graph, str] = {}
        self.taken: dict[ir.Node, ir.Graph] = {}
        self.opsets = dict(model.opset_imports)
        self._opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        for value in model.graph.inputs:
            if value.name in inputs:
                array = inputs[str(value.name)]
                self._type(value, tensor_type(onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
        self._body(model.graph)

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The shape of a value; None where it isn't known."""
        return None if value is None else shape_of(self.types.get(value))

    def element_types(self, values: Iterable[ir.Value]) -> dict[str, int]:
        """The element types of tensors by name."""
        kinds = {str(v.name): self.types[v] for v in values if v in self.types and v.name}
        return {name: kind.tensor_type.elem_type for name, kind in kinds.items() if kind.HasField("tensor_type")}

    def hold(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Note that a value is stored and holds a tensor."""
        self.known.pop(value, None)
        self._constant(value, tensor)

    def add(self, node: ir.Node) -> None:
        """Look at an operator that has just been put in."""
        self._node(node)

    def opset(self, domain: str = "") -> int:
        """The version of an operator set."""
        return self.opsets.get(domain, self.opsets.get("ai.onnx", 1) if not domain else 1)

    def _body(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            if value.const_value is not None:
                self._constant(value, value.const_value)
        for node in list(graph):
            if self.before is not None:
                self.before(self, node)
            self._node(node)

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        shape = sizes_of(tensor)
        self._type(value, tensor_type(int(tensor.dtype), shape))
        if is_small(shape, tensor.dtype):
            self.known[value] = np.array(tensor.numpy())

    def _type(self, value: ir.Value, kind: Type | None) -> None:
        """Note a type, with sizes that it leaves open as declared in the file or as measured."""
        shape = shape_of(kind)
        if shape is None and value.name in self.measured:
            dtype = kind.tensor_type.elem_type if kind is not None else int(value.dtype or ir.DataType.FLOAT)
            kind = tensor_type(dtype, self.measured[str(value.name)])
        elif shape is None and value.dtype is not None and is_closed(value.shape):
            kind = tensor_type(int(value.dtype), [int(d) for d in value.shape])  # type: ignore[arg-type, union-attr]
            self.declared.add(str(value.name))
        if kind is not None:
            self.types[value] = kind
        if shape_of(kind) is None and (kind is None or kind.HasField("tensor_type")):
            self.open.append(value)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and not node.domain:
            self._constant(node.outputs[0], constant_of(node))
        elif node.op_type in BODIES and node.domain in ("", "ai.onnx"):
            if not all(name in node.attributes for name in BODIES[node.op_type]):
                raise CaptureError(f"{place(node)} has no body: the file is damaged")
            CONTROL[node.op_type](self, node)
        else:
            self._operator(node)

    def _operator(self, node: ir.Node) -> None:
        outputs = [value for value in node.outputs if value.name]
        given = [value for value in node.inputs if value is not None]
        schema = schema_of(node, self.opset(node.domain))
        if schema is None:
            kinds = FUSED[node.op_type](self, node) if node.op_type in FUSED else [None] * len(node.outputs)
            for value, kind in zip(node.outputs, kinds, strict=False):
                self._type(value, kind)
            return
        if any(value not in self.types for value in given):
            for value in outputs:
                self._type(value, None)
            return
        proto = ir.serde.serialize_node(node)
        known = {str(v.name): self.known[v] for v in given if v in self.known}
        types = {str(v.name): self.types[v] for v in given}
        try:
            found = inferred(proto, schema, types, known, self._opsets)
        except Exception as error:
            if not any(0 in (self.shape(value) or ()) for value in given):
                raise CaptureError(f"{place(node)}: {_said(error)}{_shapes(types)}") from error
            found = {}  # nothing was found in the example: what comes of that isn't known
        for value in outputs:
            self._type(value, found.get(str(value.name)))
        self._carry_out(node, proto, known, given)

    def _carry_out(self, node: ir.Node, proto: onnx.NodeProto, known: dict[str, Known], given: list[ir.Value]) -> None:
        """The numbers of the results, where they are few and all operands are known, or only a shape is asked for."""
        outputs = [value for value in node.outputs if value.name]
        shapes = [self.shape(value) for value in outputs]
        if any(s is None or not is_small(s, _dtype(self.types[v])) for s, v in zip(shapes, outputs, strict=True)):
            return
        if node.op_type in ("Shape", "Size") and (shape := self.shape(given[0])) is not None:
            self.known[outputs[0]] = _shape_of(node, shape)
            return
        if len({str(v.name) for v in given}) == len(known):
            made = carried_out(proto, known, self.opsets)
            for value, array in zip(outputs, made or (), strict=False):
                self.known[value] = array
                self.types[value] = tensor_type(self.types[value].tensor_type.elem_type, array.shape)


def _shape_of(node: ir.Node, shape: tuple[int, ...]) -> Known:
    if node.op_type == "Size":
        return np.array(int(np.prod(shape, dtype=np.int64)), dtype=np.int64)
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    return np.array(shape[slice(start, end)], dtype=np.int64)


def _dtype(kind: Type) -> ir.DataType:
    return ir.DataType(kind.tensor_type.elem_type)


def constant_of(node: ir.Node) -> ir.TensorProtocol:
    """The tensor that a Constant holds, in whichever of its attributes."""
    for name, convert in _CONSTANTS.items():
        if name in node.attributes:
            held = node.attributes[name].value
            return held if convert is None else ir.tensor(np.array(held, dtype=convert))
    raise CaptureError(f"{place(node)}: the constant has no value that can be read")


_CONSTANTS: dict[str, Any] = {
    "value": None,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def attribute(node: ir.Node, name: str, otherwise: Any) -> Any:
    """An attribute as Python has it."""
    found = node.attributes.get(name)
    return otherwise if found is None else found.value


def place(node: ir.Node) -> str:
    """What to call an operator in a sentence."""
    name = node.name or next((str(v.name) for v in node.outputs if v.name), "")
    return f"{node.op_type} {name!r}"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _shapes(types: Mapping[str, Type]) -> str:
    shapes = [shape_of(kind) for kind in types.values()]
    return f" (operands of shapes {', '.join(map(str, shapes))})" if shapes else ""


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in the attributes of an operator."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.value
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.value


def _branches(self: Evaluator, node: ir.Node) -> None:
    """Both are gone through; the results are those of the one that the example takes, or of the first that fits."""
    graphs = [node.attributes[name].value for name in BODIES["If"]]
    condition = self.known.get(node.inputs[0])  # type: ignore[arg-type]
    if condition is not None and condition.size == 1:
        self.taken[node] = graphs[0 if bool(condition.reshape(())) else 1]
    for graph in graphs:
        _tried(self, graph, required=self.taken.get(node) is graph)
    fitting = [g for g in graphs if g not in self.failed and all(v in self.types for v in g.outputs)]
    chosen = self.taken.get(node, next(iter(fitting), graphs[0]))
    for value, made in zip(node.outputs, chosen.outputs, strict=True):
        self._type(value, self.types.get(made))
        if node in self.taken and made in self.known:
            self.known[value] = self.known[made]


def _tried(self: Evaluator, graph: ir.Graph, *, required: bool) -> None:
    try:
        self._body(graph)
    except CaptureError as error:
        if required:
            raise
        self.failed[graph] = str(error)


def _loop(self: Evaluator, node: ir.Node) -> None:
    body, carried = node.attributes["body"].value, node.inputs[2:]
    for value, dtype in zip(body.inputs[:2], (ir.DataType.INT64, ir.DataType.BOOL), strict=True):
        self._type(value, tensor_type(int(dtype), []))
    for value, given in zip(body.inputs[2:], carried, strict=True):
        self._type(value, self.types.get(given))  # type: ignore[arg-type]
    self._body(body)
    made, trips = body.outputs[1:], self.known.get(node.inputs[0]) if node.inputs[0] is not None else None
    for k, value in enumerate(node.outputs):
        kind = self.types.get(made[k])
        before = self.types.get(carried[k]) if k < len(carried) else None  # type: ignore[arg-type]
        if k >= len(carried):
            kind = _stacked(kind, None if trips is None else int(trips.reshape(())), 0)
        elif shape_of(before) != shape_of(kind):  # it grows from one round to the next
            kind = None
        self._type(value, kind)


def _scan(self: Evaluator, node: ir.Node) -> None:
    body, count = node.attributes["body"].value, int(attribute(node, "num_scan_inputs", 0))
    states = len(node.inputs) - count
    if self.opset() < _SCANS_AS_NOW:
        raise CaptureError(
            f"{place(node)} is a Scan of operator set 8, which runs over each sample by itself: convert the file to a later set, with "
            "onnx.version_converter, say"
        )
    axes = list(attribute(node, "scan_input_axes", [0] * count))
    length: int | None = None
    for k, (value, given) in enumerate(zip(body.inputs, node.inputs, strict=True)):
        kind = self.types.get(given)  # type: ignore[arg-type]
        shape = shape_of(kind)
        if k >= states and kind is not None and shape is not None:
            axis = axes[k - states] % len(shape)
            length = shape[axis]
            kind = tensor_type(kind.tensor_type.elem_type, shape[:axis] + shape[axis + 1 :])
        self._type(value, kind)
    self._body(body)
    places = list(attribute(node, "scan_output_axes", [0] * (len(node.outputs) - states)))
    for k, (value, made) in enumerate(zip(node.outputs, body.outputs, strict=True)):
        kind = self.types.get(made)
        self._type(value, kind if k < states else _stacked(kind, length, places[k - states]))


def _stacked(kind: Type | None, length: int | None, axis: int) -> Type | None:
    shape = shape_of(kind)
    if kind is None or shape is None:
        return None
    at = axis % (len(shape) + 1)
    return tensor_type(kind.tensor_type.elem_type, [*shape[:at], length, *shape[at:]])


CONTROL: dict[str, Callable[[Evaluator, ir.Node], None]] = {"If": _branches, "Loop": _loop, "Scan": _scan}
