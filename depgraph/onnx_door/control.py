"""How the values of `If`, `Loop` and `Scan` go together with those of their bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from depgraph.graph import Reason, Value
from depgraph.onnx_door.evaluating import attribute

if TYPE_CHECKING:
    from depgraph.onnx_door.lowering import Lowering

Outputs = list[Value | None]


def _join_branch(self: Lowering, node: ir.Node, body: ir.Graph, outputs: Outputs) -> None:
    for made, value in zip(outputs, body.outputs, strict=True):
        given = self.value(value)
        if made is not None and given is not None and len(made.shape) != len(given.shape):
            for dim in (*made.dims, *given.dims):
                self.program.relations.fix(dim, Reason("branches give tensors of different ranks"))
        else:
            self.join(given, made)


def _join_loop(self: Lowering, node: ir.Node, body: ir.Graph, outputs: Outputs) -> None:
    carried = node.inputs[2:]
    for k, made in enumerate(outputs):
        given = self.value(body.outputs[k + 1])
        if k < len(carried):
            into = self.value(body.inputs[k + 2])
            self.join(self.value(carried[k]), into)
            self.join(into, given)
        self.join(given, made, None if k < len(carried) else 0)


def _join_scan(self: Lowering, node: ir.Node, body: ir.Graph, outputs: Outputs) -> None:
    count = int(attribute(node, "num_scan_inputs", 0))
    states = len(node.inputs) - count
    axes = attribute(node, "scan_input_axes", [0] * count)
    places = attribute(node, "scan_output_axes", [0] * (len(outputs) - states))
    for k, (value, outer) in enumerate(zip(body.inputs, node.inputs, strict=True)):
        self.join(self.value(value), self.value(outer), None if k < states else axes[k - states])
    for k, (made, value) in enumerate(zip(outputs, body.outputs, strict=True)):
        given = self.value(value)
        if k < states:
            self.join(self.value(body.inputs[k]), given)
        self.join(given, made, None if k < states else places[k - states])


JOIN: dict[str, Callable[[Lowering, ir.Node, ir.Graph, Outputs], None]] = {
    "If": _join_branch,
    "Loop": _join_loop,
    "Scan": _join_scan,
}
