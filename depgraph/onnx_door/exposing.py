"""Values of a file as outputs of a copy of it, those inside the bodies of `If`, `Loop` and `Scan` too.

A value of a branch becomes a further result of the `If`, of which the other branch gives nothing (no elements); one of a loop's
body is stacked, a round after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import onnx_ir as ir

from depgraph.onnx_door.copies import Cut
from depgraph.onnx_door.evaluating import BODIES, Evaluator, attribute, bodies

_NUMBERS = count()


@dataclass
class Exposed:
    """A copy with further outputs: `names` has what each asked-for value is called there, `stacked` those of loops."""

    model: ir.Model
    names: dict[str, str] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)


def expose(made: Cut, values: Mapping[str, ir.Value], seen: Evaluator) -> Exposed:
    """Let a copy give some of the original's `values`, which are asked for by name; what can't be shown is left out."""
    found = Exposed(made.model)
    new, owners = made.new(), _owners(made.model.graph)
    present = {str(v.name) for v in made.model.graph.outputs}
    for name, value in values.items():
        here = new.get(value)
        kind = seen.types.get(value)
        if here is None or kind is None or not kind.HasField("tensor_type") or here.is_initializer():
            continue
        dtype, rank = ir.DataType(kind.tensor_type.elem_type), len(seen.shape(value) or ())
        body = _body_of(here)
        outer, rounds = _outwards(here, body, owners, (dtype, rank)) if body in owners else (here, False)
        if outer is None:
            continue
        if outer.type is None:
            outer.type = ir.TensorType(dtype)
        if str(outer.name) not in present and not outer.is_graph_input():
            made.model.graph.outputs.append(outer)
            present.add(str(outer.name))
        found.names[name] = str(outer.name)
        if rounds:
            found.stacked.add(name)
    return found


def _owners(graph: ir.Graph) -> dict[ir.Graph | None, ir.Node]:
    """The operator that each body belongs to."""
    found: dict[ir.Graph | None, ir.Node] = {}
    for node in graph:
        for body in bodies(node):
            found[body] = node
            found.update(_owners(body))
    return found


def _body_of(value: ir.Value) -> ir.Graph | None:
    node = value.producer()
    home = node.graph if node is not None else value.graph
    return home if isinstance(home, ir.Graph) else None


def _outwards(
    value: ir.Value, body: ir.Graph | None, owners: Mapping[ir.Graph | None, ir.Node], kind: tuple[ir.DataType, int]
) -> tuple[ir.Value | None, bool]:
    """A value of the main graph that shows one of a body, and whether it has a dim more; None where none can."""
    branched = False
    while body in owners:
        node = owners[body]
        if node.op_type == "If":
            branched = True
            value, body = _of_branch(node, body, value, kind), node.graph  # type: ignore[arg-type]
        elif node.op_type in BODIES and not branched and node.graph not in owners:
            return _of_rounds(node, body, value, kind), True  # type: ignore[arg-type]
        else:
            return None, False
    return value, False


def _copied(body: ir.Graph, value: ir.Value, kind: tuple[ir.DataType, int]) -> ir.Value:
    """A value of its own, as a body gives none twice."""
    copy = ir.node("Identity", [value], name=f"depgraph_shown_{next(_NUMBERS)}")
    copy.outputs[0].name = f"{copy.name}_out"
    copy.outputs[0].type = ir.TensorType(kind[0])
    body.append(copy)
    body.outputs.append(copy.outputs[0])
    return copy.outputs[0]


def _result(node: ir.Node, kind: tuple[ir.DataType, int]) -> ir.Value:
    """A further result of an operator."""
    node.resize_outputs(len(node.outputs) + 1)
    made = node.outputs[-1]
    made.name, made.type = f"depgraph_shown_{next(_NUMBERS)}", ir.TensorType(kind[0])
    return made


def _of_branch(node: ir.Node, body: ir.Graph, value: ir.Value, kind: tuple[ir.DataType, int]) -> ir.Value:
    _copied(body, value, kind)
    for other in bodies(node):
        if other is not body:
            nothing = ir.tensor(np.zeros((0,) * max(kind[1], 1), dtype=kind[0].numpy()), dtype=kind[0])
            none = ir.node("Constant", [], {"value": nothing}, name=f"depgraph_none_{next(_NUMBERS)}")
            none.outputs[0].name = f"{none.name}_out"
            none.outputs[0].type = ir.TensorType(kind[0])
            other.append(none)
            other.outputs.append(none.outputs[0])
    return _result(node, kind)


def _of_rounds(node: ir.Node, body: ir.Graph, value: ir.Value, kind: tuple[ir.DataType, int]) -> ir.Value:
    _copied(body, value, kind)
    for name in ("scan_output_axes", "scan_output_directions"):
        if name in node.attributes:
            node.attributes[name] = ir.AttrInt64s(name, [*attribute(node, name, ()), 0])
    return _result(node, kind)
