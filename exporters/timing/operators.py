"""The operators of an ONNX model as far as their time depends on widths: what they are, and which dims are their sizes.

All that is known here is of operators, nothing of models: a convolution with its channels in and out, a product with a stored
matrix, anything else by its multiply-accumulates or by the elements that it reads and writes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_ir as ir

from depgraph.graph import Value
from depgraph.onnx_door.graph import OnnxGraph
from exporters.timing.micro import Signature

Classes = tuple[int, ...]
CONV, PRODUCT = frozenset({"Conv"}), frozenset({"MatMul", "Gemm"})
_SETTINGS = ("kernel_shape", "strides", "pads", "dilations", "auto_pad")


@dataclass(frozen=True)
class Shape:
    """How an operator's size follows the widths: `runs` are products of the sizes of classes of dims, which add up.

    With a `signature` there is one run, the channels in and out, and its time is looked up; else it is in proportion to the sum.
    """

    runs: tuple[Classes, ...]
    signature: Signature | None = None


class Operators:
    """The main graph's operators by position."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = list(graph.model.graph)
        self.lowered = graph.capture.lowered
        self._names = {node: name for name, node in self.lowered.operators.items()}

    def name(self, position: int) -> str:
        """What to call an operator in a sentence: its first output, and what it is."""
        node = self.nodes[position]
        return f"{node.outputs[0].name} ({node.op_type})"

    def op(self, position: int) -> str:
        """The operator's name in the graph's program, by which branches name it; the empty one for what computes no values."""
        return self._names.get(self.nodes[position], "")

    def shape(self, position: int) -> Shape:
        """How the operator's size follows the widths."""
        node = self.nodes[position]
        if node.op_type in CONV:
            return self._conv(node) or self._counted(node)
        if node.op_type in PRODUCT:
            return self._product(node) or self._counted(node)
        return self._counted(node)

    @cached_property
    def signatures(self) -> dict[Signature, list[tuple[int, int]]]:
        """All signatures, with the widths in and out that the model has them at."""
        found: dict[Signature, list[tuple[int, int]]] = defaultdict(list)
        sizes = self.graph.widths.classes.size
        for position in range(len(self.nodes)):
            shape = self.shape(position)
            if shape.signature is not None:
                wide_in, wide_out = (int(sizes[number]) for number in shape.runs[0])
                found[shape.signature].append((wide_in, wide_out))
        return dict(found)

    def upstream(self, position: int) -> Iterator[int]:
        """The operators that one depends on, the nearest first."""
        place = {node: k for k, node in enumerate(self.nodes)}
        queue, seen = [self.nodes[position]], {self.nodes[position]}
        for node in queue:
            made = [value.producer() for value in node.inputs if value is not None]
            for before in made:
                if before is not None and before in place and before not in seen:
                    seen.add(before)
                    queue.append(before)
                    yield place[before]

    def like(self, shape: tuple[int, ...]) -> tuple[Classes, ...]:
        """The runs of all different activations of a shape."""
        values = self.graph.capture.program.values.values()
        return tuple({self._classes(v) for v in values if v.kind in ("activation", "input") and v.shape == shape})

    def _conv(self, node: ir.Node) -> Shape | None:
        source, weight = self.lowered.operand(node, 0), self.lowered.operand(node, 1)
        if source is None or weight is None or not self._is_stored(node.inputs[1]):
            return None
        settings = {n: _plain(node.attributes[n].value) for n in _SETTINGS if n in node.attributes}
        settings["kernel_shape"] = tuple(weight.shape[2:])
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        depthwise = groups > 1 and weight.shape[:2] == (groups, 1) and source.shape[1] == groups
        if groups > 1 and not depthwise:
            return None
        kind = "depthwise" if depthwise else "conv"
        found = Signature(kind, source.shape[0], tuple(source.shape[2:]), tuple(sorted(settings.items())))
        return Shape(((self._class(source.dim(1)), self._class(weight.dim(0))),), found)

    def _product(self, node: ir.Node) -> Shape | None:
        left, right = self.lowered.operand(node, 0), self.lowered.operand(node, 1)
        flipped = any(n in node.attributes and node.attributes[n].as_int() for n in ("transA",))
        if left is None or right is None or len(right.shape) != 2 or flipped or not self._is_stored(node.inputs[1]):
            return None
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
        inner, outer = (1, 0) if transposed else (0, 1)
        found = Signature("matmul", 1, (math.prod(left.shape[:-1]),))
        return Shape(((self._class(right.dim(inner)), self._class(right.dim(outer))),), found)

    def _counted(self, node: ir.Node) -> Shape:
        """By multiply-accumulates where a rule has told them, else by elements in and out."""
        work = [w for w in self.graph.capture.program.relations.work if w.op == self._names.get(node)]
        if work:
            return Shape(tuple(tuple(self._class(d) for d in w.dims) for w in work))
        values = [self.lowered.operand(node, k) for k in range(len(node.inputs))]
        values += [self.lowered.values.get(value) for value in node.outputs]
        runs = (self._classes(v) for v in values if v is not None and v.kind in ("activation", "input"))
        return Shape(tuple(runs))

    def _is_stored(self, value: ir.Value | None) -> bool:
        """Does a value come from stored tensors alone?"""
        if value is None or value.is_graph_input():
            return False
        node = value.producer()
        return node is None or all(v is None or self._is_stored(v) for v in node.inputs)

    def _class(self, dim: int) -> int:
        return self.graph.widths.class_of(dim)

    def _classes(self, value: Value) -> Classes:
        return tuple(self._class(dim) for dim in value.dims)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
