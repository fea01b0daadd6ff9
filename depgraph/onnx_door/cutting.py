"""The cut: stored tensors sliced, size operands and attributes rewritten, everything else as it was.

The copy of the model is gone through with its new shapes, an operator at a time; each is mended before its results are
looked at, and every shape must come out as the graph predicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from depgraph.errors import CaptureError, CutError
from depgraph.graph import Value
from depgraph.onnx_door.evaluating import Evaluator, bodies, place
from depgraph.onnx_door.examples import is_dynamic
from depgraph.onnx_door.folding import sizes_of
from depgraph.onnx_door.lowering import settings, stored
from depgraph.onnx_door.resizing import TABLE, Resized
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph

_WITH_INPUTS = 4
Indices = tuple[np.ndarray | None, ...]
"""Kept indices of each dim, None for all."""


@dataclass
class Cut:
    """A cut copy of a model, and which of its operators and values were which."""

    model: ir.Model
    nodes: dict[ir.Node, ir.Node] = field(default_factory=dict)
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    compared: int = 0

    @classmethod
    def copy(cls, model: ir.Model) -> Cut:
        """A copy that shares the weights; `nodes` and `values` lead from the copy to the original."""
        made = cls(model.clone())
        for old, new in zip(graphs(model.graph), graphs(made.model.graph), strict=True):
            for name, value in old.initializers.items():
                made.values[new.initializers[name]] = value
            made.values.update(zip(new.inputs, old.inputs, strict=True))
            for node, twin in zip(old, new, strict=True):
                made.nodes[twin] = node
                made.values.update(zip(twin.outputs, node.outputs, strict=True))
        return made

    def new(self) -> dict[ir.Value, ir.Value]:
        """From the original's values to the copy's."""
        return {old: new for new, old in self.values.items()}


def graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and the bodies within it, in the order of its operators."""
    yield graph
    for node in graph:
        for body in bodies(node):
            yield from graphs(body)


def cut_model(graph: OnnxGraph, kept: Kept) -> Cut:
    """A cut copy of the graph's model.

    Raises CutError where a size can't follow, or shapes don't come out as predicted.
    """
    made = Cut.copy(graph.model)
    _slice_stored(graph, made, kept)
    mending = _Mending(graph, made, kept)
    try:
        after = Evaluator(made.model, graph.inputs, mending.measured(), mending.before)
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
        ordered = sorted(ways.values(), key=lambda way: -len(way[1]))
        for k, (indices, uses) in enumerate(ordered):
            if k == 0:
                if any(i is not None for i in indices):
                    _hold(new[value], sliced(tensor, indices))
                continue
            other = ir.Value(name=f"{value.name}_{k}", const_value=None)
            other.const_value = sliced(tensor, indices, name=f"{value.name}_{k}")
            other.type, other.shape = ir.TensorType(tensor.dtype), ir.Shape(other.const_value.shape)
            _register(_home(new[value]), other, made.model)
            for node, position in uses:
                node.replace_input_with(position, other)


def _indices(value: Value, kept: Kept) -> Indices:
    return tuple(kept.of(value, d) for d in range(len(value.shape)))


def _key(indices: Indices) -> bytes:
    return b"|".join(b"" if i is None else i.tobytes() for i in indices)


def _home(value: ir.Value) -> ir.Graph:
    """The graph that a stored value lies in."""
    node = value.producer()
    found = node.graph if node is not None else value.graph
    assert isinstance(found, ir.Graph)
    return found


def _register(graph: ir.Graph, value: ir.Value, model: ir.Model) -> None:
    """A further initializer; old files have each among the inputs too."""
    graph.register_initializer(value)
    if model.ir_version < _WITH_INPUTS and graph is model.graph:
        graph.inputs.append(value)


def _hold(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let an initializer, or the Constant that makes a value, hold another tensor."""
    node = value.producer()
    if node is not None:
        for name in [n for n in node.attributes if n.startswith("value")]:
            del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor("value", tensor)
    else:
        value.const_value = tensor
        value.type = ir.TensorType(tensor.dtype)
    if node is None or value.shape is not None:
        value.shape = ir.Shape(sizes_of(tensor))


def sliced(tensor: ir.TensorProtocol, indices: Indices, name: str | None = None) -> ir.LazyTensor:
    """The kept part of a tensor, read when it is written out."""
    shape = [d if i is None else len(i) for d, i in zip(sizes_of(tensor), indices, strict=True)]

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        for d, i in enumerate(indices):
            if i is not None:
                array = array.take(i, axis=d)
        made = ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=name or tensor.name)
        let_go(tensor)
        return made

    return ir.LazyTensor(
        read, dtype=tensor.dtype, shape=ir.Shape(shape), name=name or tensor.name, doc_string=tensor.doc_string
    )


def let_go(tensor: ir.TensorProtocol) -> None:
    """Give the pages of a memory-mapped tensor back."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


class _Mending:
    """Mends the operators of the copy, each just before the evaluator looks at it."""

    def __init__(self, graph: OnnxGraph, made: Cut, kept: Kept) -> None:
        self.graph = graph
        self.lowered = graph.capture.lowered
        self.before_cut: Evaluator = graph.capture.evaluated
        self.made = made
        self.kept = kept
        self.narrowed = frozenset(kept.smaller())
        self.named = {node: name for name, node in self.lowered.operators.items()}
        self.dynamic = is_dynamic(graph.model)
        self.count = 0

    def measured(self) -> dict[str, tuple[int, ...]]:
        """Shapes that a run told, after the cut."""
        found = {}
        for name in self.before_cut.measured:
            value = self.lowered.program.values.get(name)
            if value is not None:
                found[name] = self.kept.shape(value)
        return found

    def before(self, evaluator: Evaluator, node: ir.Node) -> None:
        """Change what must change of an operator."""
        old = self.made.nodes.get(node)
        if old is None or node.op_type == "Constant":
            return
        self._keep_numbers(evaluator, node, old)
        name = self.named.get(old)
        if name is None or node.op_type not in TABLE or not self._is_touched(old):
            return
        op = self.lowered.ops[name]
        inputs = [self.lowered.operand(old, k) for k in range(len(old.inputs))]
        outputs = [self.lowered.values.get(v) for v in old.outputs]
        if not outputs or outputs[0] is None:
            return
        known = {k: evaluator.known.get(v) for k, v in enumerate(node.inputs) if v is not None}
        shapes = [evaluator.shape(v) for v in node.inputs]
        resized = Resized(node, op, inputs, outputs, self.kept, shapes, known)
        TABLE[node.op_type](resized)
        self._change(evaluator, resized)

    def _is_touched(self, old: ir.Node) -> bool:
        values = [self.lowered.operand(old, k) for k in range(len(old.inputs))]
        values += [self.lowered.values.get(v) for v in old.outputs]
        return any(v is not None and v.name in self.narrowed for v in values)

    def _keep_numbers(self, evaluator: Evaluator, node: ir.Node, old: ir.Node) -> None:
        """Numbers that are computed from a size and then meet data (a scale by the square root of a width) stay what they were."""
        if all(v in self.before_cut.known for v in old.outputs if v.name):
            return
        for k, (value, was) in enumerate(zip(node.inputs, old.inputs, strict=True)):
            if value is None or was is None or k in settings(node) or stored(was) is not None:
                continue
            before, after = self.before_cut.known.get(was), evaluator.known.get(value)
            if before is None or after is None or before.shape != after.shape or np.array_equal(before, after):
                continue
            self._set_operand(evaluator, node, k, before)

    def _change(self, evaluator: Evaluator, resized: Resized) -> None:
        node = resized.node
        for position, array in resized.operands.items():
            self._set_sizes(evaluator, node, position, array)
        for name, value in resized.attributes.items():
            if value is None:
                node.attributes.pop(name, None)
            else:
                node.attributes[name] = _attribute(name, value)
        for axis, index in resized.gathers:
            self._gather(evaluator, node, axis, index)

    def _gather(self, evaluator: Evaluator, node: ir.Node, axis: int, index: np.ndarray) -> None:
        """What is left of a part that no bounds describe is picked before."""
        base = f"{node.outputs[0].name}_kept"
        picks = self._constant(evaluator, node, f"{base}_indices", index.astype(np.int64))
        gather = ir.node("Gather", [node.inputs[0], picks], {"axis": axis}, name=self._free(base))
        gather.outputs[0].name = gather.name
        node.prepend(gather)
        evaluator.add(gather)
        node.replace_input_with(0, gather.outputs[0])

    def _set_sizes(self, evaluator: Evaluator, node: ir.Node, position: int, array: np.ndarray) -> None:
        """Other numbers for a size operand. Where sizes are open, only those change that the cut does."""
        while len(node.inputs) <= position:
            node.resize_inputs(position + 1)
        value = node.inputs[position]
        made = value.producer() if value is not None else None
        if value is None or stored(value) is not None or not self.dynamic:
            self._set_operand(evaluator, node, position, array)
            return
        assert made is not None
        now = evaluator.known[value].reshape(-1)
        if len(now) != len(array):
            raise CutError(f"{place(node)} takes another number of sizes after the cut")
        changed = np.flatnonzero(now != array.reshape(-1))
        mask = np.zeros(array.shape, dtype=bool)
        mask.reshape(-1)[changed] = True
        base = f"{node.outputs[0].name}_sizes"
        operands = [
            self._constant(evaluator, node, f"{base}_changed", mask),
            self._constant(evaluator, node, f"{base}_new", array.astype(np.int64)),
            value,
        ]
        where = ir.node("Where", operands, name=f"{node.name or base}_sizes")
        where.outputs[0].name = self._free(base)
        node.prepend(where)
        evaluator.add(where)
        node.replace_input_with(position, where.outputs[0])

    def _set_operand(self, evaluator: Evaluator, node: ir.Node, position: int, array: np.ndarray) -> None:
        """A constant of its own for one operand: others may read the old one."""
        value = node.inputs[position]
        if value is not None and len(value.uses()) == 1 and stored(value) is not None:
            tensor = ir.tensor(array.astype(evaluator.known[value].dtype), name=value.name)
            _hold(value, tensor)
            evaluator.hold(value, tensor)
            return
        name = str(value.name) if value is not None else f"{node.outputs[0].name}_{position}"
        node.replace_input_with(position, self._constant(evaluator, node, f"{name}_cut", array))

    def _constant(self, evaluator: Evaluator, node: ir.Node, name: str, array: np.ndarray) -> ir.Value:
        """A further initializer in the graph of an operator."""
        tensor = ir.tensor(array, name=self._free(name))
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        _register(self.made.model.graph, value, self.made.model)
        evaluator.hold(value, tensor)
        return value

    def _free(self, name: str) -> str:
        """A name that no value has yet."""
        taken = self._taken()
        found, k = name, 1
        while found in taken:
            found, k = f"{name}_{k}", k + 1
        taken.add(found)
        return found

    def _taken(self) -> set[str]:
        if not hasattr(self, "_names"):
            self._names = {str(v.name) for v in self.made.values}
        return self._names


def _attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    return ir.AttrInt64s(name, value) if isinstance(value, Sequence) else ir.AttrInt64(name, int(value))


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
