"""Weights and biases of a file, such as a cut one, under the names that the graph of the original has for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from depgraph.errors import ScoreError
from depgraph.onnx_door.arrays import read_array
from depgraph.onnx_door.copies import graphs, hold, home, register
from depgraph.onnx_door.operands import stored
from depgraph.onnx_door.windows import bias_at

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph


class Editing:
    """Reads and writes what a file holds, in place. `graph` is that of the file, or of the one that it was cut from."""

    def __init__(self, model: ir.Model, graph: OnnxGraph) -> None:
        self.model, self.graph = model, graph
        self.lowered = graph.capture.lowered
        self.undo: list[Callable[[], None]] = []

    def read(self, name: str) -> np.ndarray:
        """A stored tensor; raises ScoreError where the file doesn't hold it as the original does."""
        tensor = stored(self._value(name))
        assert tensor is not None
        return read_array(tensor)

    def write(self, name: str, array: np.ndarray) -> None:
        """Other numbers for a stored tensor; where other operators share it, the one that this name is of gets its own."""
        value = self._value(name)
        tensor = stored(value)
        assert tensor is not None
        fresh = ir.Tensor(np.ascontiguousarray(array.astype(tensor.dtype.numpy())), dtype=tensor.dtype, name=value.name)
        node, position = self._use(name)
        if len(value.uses()) > 1 and len(self._uses[name]) == 1 and self.lowered.uses:
            own = self._initializer(home(value), f"{value.name}_own", fresh)
            node.replace_input_with(position, own)
            self.undo.append(lambda: node.replace_input_with(position, value))
            return
        hold(value, fresh)
        self.undo.append(lambda: hold(value, tensor))

    def can_add(self, op: str) -> bool:
        """Can an operator of the original be given a bias here?"""
        return self._made_by(op) is not None

    def add_bias(self, op: str, name: str, array: np.ndarray) -> None:
        """Let what an operator puts out be added to: as its bias, where it takes one, else by an addition after it.

        `name` is wished for: the initializer gets it, or one like it. `op` is what the original's graph calls the operator.
        """
        node, place = self._made_by(op), bias_at(self.lowered, op)
        assert node is not None and place is not None and not place.there
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        kind = self.graph.capture.evaluated.types[self.lowered.operators[op].outputs[0]].tensor_type.elem_type
        dtype = ir.DataType(kind)
        value = self._initializer(graph, name, ir.Tensor(array.astype(dtype.numpy()), dtype=dtype))
        self.added[op] = value
        if place.node is not None:
            self._fill(node, place.position, value)
            return
        self.undo.append(_add_after(node, value))

    def _fill(self, node: ir.Node, position: int, value: ir.Value) -> None:
        """Give an operator an operand that it did without."""
        count = len(node.inputs)

        def back() -> None:
            node.replace_input_with(position, None)
            node.resize_inputs(count)

        node.resize_inputs(max(count, position + 1))
        node.replace_input_with(position, value)
        self.undo.append(back)

    def read_bias(self, op: str) -> np.ndarray:
        """A bias that was added."""
        tensor = self.added[op].const_value
        assert tensor is not None
        return read_array(tensor)

    def write_bias(self, op: str, array: np.ndarray) -> None:
        """Other numbers for a bias that was added."""
        value = self.added[op]
        dtype = value.const_value.dtype  # type: ignore[union-attr]
        value.const_value = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=value.name)

    @cached_property
    def added(self) -> dict[str, ir.Value]:
        """The biases that were made, by operator."""
        return {}

    def put_back(self) -> None:
        """Take back all that was changed."""
        while self.undo:
            self.undo.pop()()

    def _initializer(self, graph: ir.Graph, name: str, tensor: ir.Tensor) -> ir.Value:
        taken, found, k = self._taken, name, 1
        while found in taken:
            found, k = f"{name}_{k}", k + 1
        taken.add(found)
        tensor.name = found
        value = ir.Value(
            name=found, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        register(graph, value, self.model)
        self.undo.append(lambda: graph.initializers.__delitem__(found))
        return value

    @cached_property
    def _taken(self) -> set[str]:
        found = {str(v.name) for graph in graphs(self.model.graph) for node in graph for v in node.outputs}
        return found.union(*(map(str, graph.initializers) for graph in graphs(self.model.graph)))

    @cached_property
    def _uses(self) -> dict[str, list[tuple[str, int]]]:
        """Where the original reads each stored tensor: operators by name, and positions."""
        found: dict[str, list[tuple[str, int]]] = {}
        for name, node in self.lowered.operators.items():
            for position in range(len(node.inputs)):
                value = self.lowered.operand(node, position)
                if value is not None and value.name in self.lowered.held:
                    found.setdefault(value.name, []).append((name, position))
        return found

    @cached_property
    def _makers(self) -> dict[str, ir.Node]:
        return {str(node.outputs[0].name): node for graph in graphs(self.model.graph) for node in graph if node.outputs}

    def _made_by(self, op: str) -> ir.Node | None:
        return self._makers.get(str(self.lowered.operators[op].outputs[0].name))

    def _use(self, name: str) -> tuple[ir.Node, int]:
        op, position = self._uses[name][0]
        node = self._made_by(op)
        if node is None or position >= len(node.inputs):
            raise ScoreError(f"{self.graph.name}: the cut file no longer has the operator that reads {name!r}")
        return node, position

    def _value(self, name: str) -> ir.Value:
        node, position = self._use(name)
        value = node.inputs[position]
        if value is None or stored(value) is None:
            raise ScoreError(
                f"{self.graph.name}: {name!r} is no longer held as it is read, so that it can't be changed"
            )
        return value


def _add_after(node: ir.Node, value: ir.Value) -> Callable[[], None]:
    """Add a vector to what an operator makes, under the name that this had; gives what takes that back."""
    made = node.outputs[0]
    name = made.name
    add = ir.Node("", "Add", [], num_outputs=1, name=f"{node.name or name}_bias")
    node.append(add)
    made.replace_all_uses_with(add.outputs[0], replace_graph_outputs=True)
    add.resize_inputs(2)
    add.replace_input_with(0, made)
    add.replace_input_with(1, value)
    add.outputs[0].type, add.outputs[0].shape = made.type, made.shape
    made.name, add.outputs[0].name = f"{name}_without_bias", name

    def back() -> None:
        made.name, add.outputs[0].name = name, f"{name}_gone"
        add.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(add, safe=True)

    return back
