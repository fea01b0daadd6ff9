"""What a captured program computes from its model's tensors alone: weights as they are when they meet data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from depgraph import DependencyGraph
from depgraph.graph import Value
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.onnx_door.steps import Step
from depgraph.operators import operator_name, writes

_LOOKUPS = frozenset(["index", "unsafe_index", "_unsafe_index", "index_select", "gather", "embedding"])
_COPIES = frozenset(
    ["to", "_to_copy", "clone", "contiguous", "detach", "alias", "view_as", "type_as", "lift_fresh_copy"]
)


class Stored:
    """The nodes of a graph's program that no input reaches, the parameters they are made of, and their values."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.exported, self.values = graph.capture.exported, graph.capture.program.values
        self.tensors = graph.tensors()
        self.nodes: list[Node] = list(self.exported.graph.nodes)
        self.targets = {spec.arg.name: spec.target for spec in self.exported.graph_signature.input_specs}
        self._named: dict[str, Node] = {}
        self.made_of: dict[Node, frozenset[str]] = {}
        for node in self.nodes:
            self._read(node)

    def _read(self, node: Node) -> None:
        value = self.values.get(node.name)
        self._named.setdefault(value.name if value is not None else node.name, node)
        if node.op in ("placeholder", "get_attr"):
            if value is not None and value.kind != "input":
                self.made_of[node] = frozenset([value.target] if value.kind == "parameter" else [])
        elif node.op == "call_function" and all(n in self.made_of for n in node.all_input_nodes):
            self.made_of[node] = frozenset[str]().union(*(self.made_of[n] for n in node.all_input_nodes))

    def node_of(self, value_name: str) -> Node | None:
        """The node of a value that no input reaches; None for any other."""
        node = self._named.get(value_name)
        return node if node in self.made_of else None

    def tensor(self, node: Node) -> Tensor:
        """The value of a node that no input reaches, from the model's tensors as they are now."""
        with torch.no_grad():
            made: Tensor = self._made(node)
        return made.detach()

    def _made(self, node: Node) -> Any:
        if node.op == "placeholder":
            target = str(self.targets[node.name])
            return self.tensors[target] if target in self.tensors else self.exported.constants[target]
        if node.op == "get_attr":
            return getattr(self.exported.graph_module, str(node.target))
        args, kwargs = map_arg((node.args, node.kwargs), self._made)
        if writes(node):
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def counts(self, value_name: str) -> bool:
        """Does a value hold integers, which say where things are, and nothing that flows?"""
        made = self._named[value_name].meta.get("val") if value_name in self._named else None
        return isinstance(made, Tensor) and not (made.is_floating_point() or made.is_complex())

    def looked_up(self, value_name: str) -> Value | None:
        """The parameter in whose rows a value was looked up, by indices that depend on inputs; None if it wasn't."""
        node = self._named.get(value_name)
        while node is not None and operator_name(node.target) in _COPIES:
            node = node.all_input_nodes[0]
        if node is None or operator_name(node.target) not in _LOOKUPS:
            return None
        source = node.args[0]
        value = self.values.get(source.name) if isinstance(source, Node) else None
        return value if value is not None and value.kind == "parameter" else None


class FileStored:
    """The same for a file: the steps that no input reaches, and their values, which ONNX Runtime computes where need be."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph, self.values = graph, graph.capture.program.values
        self.tensors = graph.tensors()
        self._named = {step.name: step for step in graph.nodes}
        self.made_of: dict[Step, frozenset[str]] = {}
        for step in graph.nodes:
            value = self.values.get(step.name)
            if step.op == "placeholder" and value is not None and value.kind != "input":
                self.made_of[step] = frozenset([value.target] if value.kind == "parameter" else [])
            elif step.op == "call_function" and all(n in self.made_of for n in step.all_input_nodes):
                self.made_of[step] = frozenset[str]().union(*(self.made_of[n] for n in step.all_input_nodes))

    def node_of(self, value_name: str) -> Step | None:
        """The step of a value that no input reaches; None for any other."""
        step = self._named.get(value_name)
        return step if step in self.made_of else None

    def tensor(self, step: Step) -> Tensor:
        """The value of a step that no input reaches."""
        if step.name in self.tensors:
            return self.tensors[step.name]
        made: list[Tensor] = []
        self.graph.observer().run(((), self.graph.inputs), seen={step.name: made.append})
        return made[0]

    def counts(self, value_name: str) -> bool:
        """Does a value hold integers?"""
        kind = self.graph.capture.lowered.kinds.get(value_name)
        return kind is not None and not kind.is_floating_point

    def looked_up(self, value_name: str) -> Value | None:
        """The parameter in whose rows a value was looked up, by indices that depend on inputs; None if it wasn't."""
        step = self._named.get(value_name)
        node = step.operator if step is not None else None
        if step is None or node is None or node.op_type not in ("Gather", "GatherElements", "GatherND"):
            return None
        value = self.graph.capture.lowered.operand(node, 0)
        return value if value is not None and value.kind == "parameter" else None


AnyStored = Stored | FileStored


def stored_in(graph: DependencyGraph) -> AnyStored:
    """What a graph's program computes from stored tensors alone."""
    return FileStored(graph) if isinstance(graph, OnnxGraph) else Stored(graph)
