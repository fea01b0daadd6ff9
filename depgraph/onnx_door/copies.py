"""A copy of a model that shares its weights, and stored tensors in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from depgraph.onnx_door.evaluating import bodies
from depgraph.onnx_door.folding import sizes_of

_WITH_INPUTS = 4
"""From this version on, files needn't have initializers among the inputs."""


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


def home(value: ir.Value) -> ir.Graph:
    """The graph that a stored value lies in."""
    node = value.producer()
    found = node.graph if node is not None else value.graph
    assert isinstance(found, ir.Graph)
    return found


def register(graph: ir.Graph, value: ir.Value, model: ir.Model) -> None:
    """A further initializer; old files have each among the inputs too."""
    graph.register_initializer(value)
    if model.ir_version < _WITH_INPUTS and graph is model.graph:
        graph.inputs.append(value)


def hold(value: ir.Value, tensor: ir.TensorProtocol) -> None:
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
