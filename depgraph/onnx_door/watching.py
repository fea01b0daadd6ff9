"""Where two runs of a model are compared: at its outputs, or before what hides or enlarges differences on the way there.

A sigmoid that gives nothing but zeros proves nothing, so what goes into it is looked at; and where an operator chooses (the
highest scores, boxes that don't overlap), a rounding error may choose otherwise, so what it chooses from is looked at, and all
else that comes into what is computed from its choice. Of a comparison, that is what it compares.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from depgraph.onnx_door.evaluating import bodies

_CHOOSES = frozenset(
    ["TopK", "NonMaxSuppression", "NonZero", "ArgMax", "ArgMin", "Unique", "Compress", "Multinomial", "Hardmax"]
)
_SATURATES = frozenset(["Sigmoid", "Softmax", "LogSoftmax", "HardSigmoid", "Tanh", "Clip", "Erf"])
_COMPARES = frozenset(["Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Xor", "Not"])
_MOVES = frozenset(
    ["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Gather", "Slice", "Split"]
)
_ROUNDS = frozenset(["QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"])


def watched(model: ir.Model) -> list[str]:
    """Names of the values of the main graph that are compared, each once."""
    chosen = _after_choices(model.graph)
    found = dict.fromkeys(_before(value) for value in model.graph.outputs if value not in chosen)
    for node in model.graph:
        if not chosen.isdisjoint(node.outputs):
            seen = (w for v in _read(node) if v not in chosen for w in _compared(v))
            found.update(dict.fromkeys(w for w in seen if w not in chosen))
    made = {value for node in model.graph for value in node.outputs if node.op_type != "Constant"}
    names = [str(value.name) for value in found if value in made and value.name]
    return names or [str(value.name) for value in model.graph.outputs]


def rounds(model: ir.Model) -> bool:
    """Are numbers rounded on the way, so that small differences come out as steps?"""
    return any(node.op_type in _ROUNDS for graph in model.graphs() for node in graph)


def _before(value: ir.Value) -> ir.Value:
    """What goes into the operator that squeezes a value into a range; the value itself where there is none."""
    here = value
    while (node := here.producer()) is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        here = node.inputs[0]
    squeezed = node is not None and node.op_type in _SATURATES and node.inputs[0] is not None
    return node.inputs[0] if squeezed else value  # type: ignore[union-attr, return-value]


def _compared(value: ir.Value) -> Iterator[ir.Value]:
    """A value, or what it says the outcome of a comparison of."""
    node = value.producer()
    if node is None or node.op_type not in _COMPARES:
        yield _before(value)
        return
    for given in node.inputs:
        if given is not None:
            yield from _compared(given)


def _chooses(node: ir.Node) -> bool:
    return node.op_type in _CHOOSES or any(_chooses(inner) for body in bodies(node) for inner in body)


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What an operator reads, in its bodies too."""
    yield from (value for value in node.inputs if value is not None)
    for body in bodies(node):
        for inner in body:
            yield from _read(inner)


def _after_choices(graph: ir.Graph) -> set[ir.Value]:
    """All that is computed from what was chosen."""
    found: set[ir.Value] = set()
    for node in graph:
        if _chooses(node) or any(value in found for value in _read(node)):
            found.update(node.outputs)
    return found
