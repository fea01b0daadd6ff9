"""Operators of a cut copy are given the size operands and attributes that the cut makes them need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from depgraph.errors import CutError
from depgraph.onnx_door.copies import Cut, hold, register
from depgraph.onnx_door.evaluating import Evaluator, place
from depgraph.onnx_door.examples import is_dynamic
from depgraph.onnx_door.operands import settings, sizes_at, stored
from depgraph.onnx_door.resizing import TABLE, Resized
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph


_HAS_WHERE = 9


class Mending:
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
        """Shapes that a run or the file told, after the cut."""
        found = {}
        for name in (*self.before_cut.measured, *self.before_cut.declared):
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
        if name is None or node.op_type not in TABLE or not self._is_touched(evaluator, node, old):
            return
        op = self.lowered.ops[name]
        inputs = [self.lowered.operand(old, k) for k in range(len(old.inputs))]
        outputs = [self.lowered.values.get(v) for v in old.outputs]
        if all(value is None for value in outputs):
            return
        known = {k: evaluator.known.get(v) for k, v in enumerate(node.inputs) if v is not None}
        if any(known.get(k, 0) is None for k in sizes_at(node)):
            return  # sizes that are computed from the data: whether they follow, the check tells
        shapes = [evaluator.shape(v) for v in node.inputs]
        resized = Resized(node, op, inputs, outputs, self.kept, shapes, known)
        TABLE[node.op_type](resized)
        self._change(evaluator, resized)

    def _is_touched(self, evaluator: Evaluator, node: ir.Node, old: ir.Node) -> bool:
        """Are its tensors narrower, or are sizes that it is given computed from one that is?"""
        for k in settings(old):
            if k < len(old.inputs) and k < len(node.inputs):
                was = self.before_cut.known.get(old.inputs[k])  # type: ignore[arg-type]
                now = evaluator.known.get(node.inputs[k])  # type: ignore[arg-type]
                if was is not None and now is not None and not np.array_equal(was, now):
                    return True
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
                node.attributes[name] = _as_attribute(name, value)
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
        if evaluator.opset() < _HAS_WHERE:
            raise CutError(
                f"{place(node)} takes computed sizes, which can't be mended in a file of operator set 8 or before"
            )
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
            hold(value, tensor)
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
        register(self.made.model.graph, value, self.made.model)
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


def _as_attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    return ir.AttrInt64s(name, value) if isinstance(value, Sequence) else ir.AttrInt64(name, int(value))
