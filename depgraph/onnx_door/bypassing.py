"""A copy of a file without some of its branches and blocks, and the other side of its check: with these, but made to do nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from depgraph.cutting.bypassing import left_of
from depgraph.onnx_door.copies import Cut, graphs
from depgraph.onnx_door.skipping import branch_side, take_apart
from depgraph.onnx_door.zeroing import HAS_WHERE, constant, fill, zero_of

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph

_BIASED, _NORM = 0, 2
"""Parts of a fused operator, see `skipping.take_apart`."""


def leave_out(graph: OnnxGraph, made: Cut, names: Iterable[str]) -> None:
    """Let the streams of a copy go past the named branches and blocks, and take away what nothing reads any more.

    Raises PlanError for a name that is neither, or can't go.
    """
    left = left_of(graph, names)
    past = _Past(graph, made)
    stays = {step.operator for step in left.nodes}  # type: ignore[attr-defined]
    for step in graph.nodes:
        if step.part == _NORM and step.name in left.gone and step.operator in stays:
            past.take_apart(step)
    for step in left.nodes:
        if step in left.instead:
            past.go(step, left.instead[step])
    sweep(made)


def idle(graph: OnnxGraph, made: Cut, names: Iterable[str]) -> None:
    """Fill what the named branches add with zeros, and let what enters the named blocks go on; they are computed all the same."""
    branches = {branch.name: branch for branch in graph.branches}
    blocks = {block.name: block for block in graph.blocks}
    steps = {step.name: step for step in graph.nodes}
    past = _Past(graph, made)
    for name in names:
        if name in branches:
            branch = branches[name]
            for operand in branch.operands:
                _silence(graph, past, steps[branch.add], steps[operand])
        else:
            past.choose(steps[blocks[name].output], steps[blocks[name].input])


class _Past:
    """The values of a copy, and what goes on in their place."""

    def __init__(self, graph: OnnxGraph, made: Cut) -> None:
        self.graph, self.made = graph, made
        self.twins = {old: twin for twin, old in made.nodes.items()}
        self.new = made.new()
        self.values = {value.name: at for at, value in graph.capture.lowered.values.items()}
        self.instead: dict[ir.Value, ir.Value] = {}
        self.parts: dict[ir.Node, tuple[ir.Node | None, ir.Node, ir.Node]] = {}

    def twin(self, step: Any) -> ir.Node:
        """The operator of the copy; one that is fused comes apart where only a part of it goes."""
        node = self.twins[step.operator]
        if step.part is None or (step.part == _NORM and node not in self.parts):
            return node
        if node not in self.parts:
            self.take_apart(step)
        found = self.parts[node][step.part]
        assert found is not None
        return found

    def take_apart(self, step: Any) -> None:
        """Put the operators that a fused one stands for in its place."""
        node = self.twins[step.operator]
        outputs = [node.outputs[-1], node.outputs[0]]
        self.parts[node] = take_apart(node)
        for old, part in zip(outputs, self.parts[node][1:], strict=True):
            original = self.made.values.pop(old)
            self.made.values[part.outputs[0]] = original
            self.new[original] = part.outputs[0]
            if old in self.instead:
                self.instead[part.outputs[0]] = self.instead.pop(old)

    def go(self, step: Any, instead: Any) -> None:
        """Let what another step made be read in place of what this one made."""
        node = self.twin(step)
        out, value = node.outputs[0], self._value(step, instead)
        if out.is_graph_output():
            out = self._renamed(node, out, value)
        out.replace_all_uses_with(value)
        self.instead[out] = value

    def choose(self, step: Any, source: Any) -> None:
        """The same, without anything being left out."""
        node, opset = self.twin(step), self.graph.capture.evaluated.opset()
        out, value = node.outputs[0], self._value(step, source)
        if opset < HAS_WHERE:
            self.go(step, source)
            return
        picks = ir.node("Where", [], {}, name=f"{out.name}_past")
        node.append(picks)
        name, out.name = out.name, f"{out.name}_unread"
        out.replace_all_uses_with(picks.outputs[0], replace_graph_outputs=True)
        picks.resize_inputs(3)
        truth = constant(picks, f"{name}_true", ir.tensor(np.ones((), dtype=bool)))
        for k, operand in enumerate((truth, value, out)):
            picks.replace_input_with(k, operand)
        picks.outputs[0].name, picks.outputs[0].type, picks.outputs[0].shape = name, out.type, out.shape
        self.instead[out] = picks.outputs[0]

    def operand(self, step: Any, source: Any) -> int | None:
        """At which position an operator reads what another step makes."""
        if source.part == _BIASED and source.operator is step.operator:
            return branch_side(step.operator)
        for k, value in enumerate(step.operator.inputs):
            seen = self.graph.capture.lowered.operand(step.operator, k)
            if seen is not None and (
                value.producer() is source.operator if source.operator else seen.name == source.name
            ):
                return k
        return None

    def _value(self, step: Any, source: Any) -> ir.Value:
        position = self.operand(step, source) if step.part != _NORM else None
        if position is not None:
            found = self.twin(step).inputs[position]
            assert found is not None
            return found
        here = self.new[self.values[source.name]]
        return self.instead.get(here, here)

    def _renamed(self, node: ir.Node, out: ir.Value, value: ir.Value) -> ir.Value:
        """An output keeps its name: a copy of `value` has it from now on."""
        copy = ir.node("Identity", [value], name=f"{out.name}_copy")
        node.append(copy)
        name, out.name = out.name, f"{out.name}_left_out"
        out.replace_all_uses_with(copy.outputs[0], replace_graph_outputs=True)
        made = copy.outputs[0]
        made.name, made.type, made.shape = name, out.type, out.shape
        made.doc_string = out.doc_string
        return out


def _silence(graph: OnnxGraph, past: _Past, add: Any, operand: Any) -> None:
    position = past.operand(add, operand)
    value = graph.capture.lowered.operand(add.operator, position) if position is not None else None
    if position is None or value is None:
        return
    kind = graph.capture.evaluated.types[add.operator.inputs[position]].tensor_type.elem_type
    mask = np.zeros((1,) * len(value.shape), dtype=bool)
    zero = zero_of(graph, add.operator, position, ir.DataType(kind))
    fill(past.twin(add), position, mask, zero, graph.capture.evaluated.opset())


def sweep(made: Cut) -> None:
    """Take away operators and stored tensors of a copy that nothing reads any more, but was read in the original."""
    for graph in [*graphs(made.model.graph)][::-1]:
        for node in [*graph][::-1]:
            old = made.nodes.get(node)
            idle = not any(v.uses() or v.is_graph_output() for v in node.outputs)
            if idle and (old is None or any(v.uses() or v.is_graph_output() for v in old.outputs)):
                graph.remove(node, safe=True)
    for graph in graphs(made.model.graph):
        for name, value in list(graph.initializers.items()):
            old_value = made.values.get(value)
            if value.uses() or value.is_graph_output() or (old_value is not None and not old_value.uses()):
                continue
            del graph.initializers[name]
            if value in graph.inputs:
                graph.inputs.remove(value)
