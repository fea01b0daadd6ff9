"""What the operands of ONNX's operators are: data, weights, or numbers that say how to compute."""

from __future__ import annotations

import onnx_ir as ir

from depgraph.onnx_door.evaluating import constant_of

_REDUCTIONS = [
    f"Reduce{name}" for name in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
]
_SIZES = {
    "Reshape": {1},
    "Expand": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Tile": {1},
    "Pad": {1, 2, 3},
    "Resize": {1, 2, 3},
    "Upsample": {1},
    "Squeeze": {1},
    "Unsqueeze": {1},
    "TopK": {1},
    "CumSum": {1},
    "OneHot": {1, 2},
    "Clip": {1, 2},
    "Trilu": {1},
    "Dropout": {1, 2},
    "ConstantOfShape": {0},
    "Range": {0, 1, 2},
    "CenterCropPad": {1},
    "AffineGrid": {1},
    "Col2Im": {1, 2},
    "NonMaxSuppression": {2, 3, 4},
    **dict.fromkeys(_REDUCTIONS, {1}),
}
"""Operands, by position, that hold sizes, bounds, places and the like."""
_POINTS = {
    "QLinearConv": {1, 2, 6, 7},
    "QLinearMatMul": {1, 2, 6, 7},
    "ConvInteger": {2},
    "MatMulInteger": {2},
    "GroupQueryAttention": {5, 6},
}
"""Operands that say how an operator computes, too, but nothing that a cut could change: zero points, lengths of sequences."""
_STATISTICS = {"BatchNormalization": {3, 4}}
PARTS = frozenset(["Slice", "Split", "Gather", "Reshape", "Unsqueeze", "Concat", "If", "Loop", "Scan"])
"""Operators that take parts of a vector, or move it: what shares it goes together."""
_WEIGHTS = {
    "DequantizeLinear": {0},
    "ConvInteger": {1},
    "MatMulInteger": {1},
    "QLinearConv": {3, 8},
    "QLinearMatMul": {3},
}
"""Operands of integers that are a model's weights."""


def stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor that the file holds for a value: an initializer's, or a Constant's."""
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    return constant_of(node) if node is not None and node.op_type == "Constant" and not node.domain else None


def settings(node: ir.Node) -> set[int]:
    """The operands that say how an operator computes and hold no data."""
    return sizes_at(node) or _POINTS.get(node.op_type, set())


def sizes_at(node: ir.Node) -> set[int]:
    """The operands that say how an operator computes by sizes, which may follow a cut."""
    return _SIZES.get(node.op_type, set())


def target_of(node: ir.Node) -> str:
    """What the table of rules calls an operator."""
    domain = "onnx" if node.domain in ("", "ai.onnx") else node.domain.rsplit(".", 1)[-1]
    return f"{domain}.{node.op_type}"


def kind_of(value: ir.Value, tensor: ir.TensorProtocol) -> str:
    """Weights are parameters, statistics and whole numbers buffers; a single number is only a constant."""
    uses = value.uses()
    if not len(tensor.shape):
        return "constant"
    if tensor.dtype.is_floating_point():
        return "buffer" if any(k in _STATISTICS.get(n.op_type, ()) for n, k in uses) else "parameter"
    return "parameter" if any(k in _WEIGHTS.get(n.op_type, ()) for n, k in uses) else "buffer"
