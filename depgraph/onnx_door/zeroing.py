"""The other side of the check: the original, with zeros filled in where removed groups would feed what comes after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from depgraph.cutting.sides import Side
from depgraph.onnx_door.copies import Cut
from depgraph.onnx_door.cutting import cut_model

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph


_HAS_WHERE = 9
_ZERO_POINTS = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), {0: 2, 3: 5}),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), {0: 2, 1: 3}),
}


def zeroed(graph: OnnxGraph, side: Side) -> ir.Model:
    """A copy of the model that is cut as `side.sliced` says and holds zeros as `side.zeroed` says."""
    made = cut_model(graph, side.sliced) if side.sliced.masks else Cut.copy(graph.model)
    lowered = graph.capture.lowered
    twins = {old: twin for twin, old in made.nodes.items()}
    opset = graph.capture.evaluated.opset()
    for operator, operands in side.masks(lowered.program).items():
        old = lowered.operators[operator]
        for k, given in enumerate(old.inputs):
            value = lowered.operand(old, k)
            for d, gone in operands.get(value.name, ()) if value is not None else ():
                dtype = ir.DataType(graph.capture.evaluated.types[given].tensor_type.elem_type)
                mask = _mask(side.sliced.shape(value), d, gone)
                _fill(twins[old], k, mask, _zero(graph, old, k, dtype), opset)
    return made.model


def _mask(shape: tuple[int, ...], d: int, gone: np.ndarray) -> np.ndarray:
    """True where a tensor of that shape stays, in its number of dims."""
    stays = np.ones(shape[d], dtype=bool)
    stays[gone] = False
    return stays.reshape([-1 if k == d else 1 for k in range(len(shape))])


def _zero(graph: OnnxGraph, node: ir.Node, position: int, dtype: ir.DataType) -> ir.TensorProtocol:
    """What stands for zero in an operand: of quantised numbers, their zero point."""
    at = _ZERO_POINTS.get(node.op_type, {}).get(position)
    point = node.inputs[at] if at is not None and at < len(node.inputs) else None
    known = None if point is None else graph.capture.evaluated.known.get(point)
    number = np.zeros((), dtype=dtype.numpy()) if known is None else known.reshape(-1)[0].reshape(())
    return ir.tensor(number, dtype=dtype)


def _fill(node: ir.Node, position: int, mask: np.ndarray, zero: ir.TensorProtocol, opset: int) -> None:
    """Zeros in an operand where the mask is false, for this operator only; old versions have no Where, but products."""
    value = node.inputs[position]
    assert value is not None and value.name
    base = f"{value.name}_{node.outputs[0].name}_{position}_stays_{mask.size}"
    if opset < _HAS_WHERE:
        factors = ir.tensor(mask.astype(zero.numpy().dtype))
        filled = ir.node("Mul", [value, _constant(node, f"{base}_mask", factors)], name=base)
    else:
        parts = [_constant(node, f"{base}_mask", ir.tensor(mask)), value, _constant(node, f"{base}_zero", zero)]
        filled = ir.node("Where", parts, name=base)
    filled.outputs[0].name = base
    filled.outputs[0].type = ir.TensorType(zero.dtype)
    node.prepend(filled)
    node.replace_input_with(position, filled.outputs[0])


def _constant(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    made = ir.node("Constant", [], {"value": tensor}, name=name)
    made.outputs[0].name = name
    node.prepend(made)
    return made.outputs[0]
