"""The other side of the check: the original, with zeros filled in where removed groups would feed what comes after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from depgraph.cutting.sides import Side
from depgraph.onnx_door.copies import Cut
from depgraph.onnx_door.cutting import cut_model
from depgraph.onnx_door.masking import FORMS, Masked, has_form

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph


HAS_WHERE = 9
_ZERO_POINTS = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), {0: 2, 3: 5}),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), {0: 2, 1: 3}),
}


def zeroed(graph: OnnxGraph, side: Side) -> Cut:
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
                fill(twins[old], k, mask, zero_of(graph, old, k, dtype), opset)
    _mask_mixing(graph, side, twins)
    return made


def comparable(graph: OnnxGraph, names: Iterable[str]) -> set[str]:
    """Which of some mixed axes are mixed only by operators that have a form which leaves removed indices out."""
    opset, barred = graph.capture.evaluated.opset(), set[int]()
    for operator, dims in graph.capture.lowered.mixing.items():
        node = graph.capture.lowered.operators.get(operator)
        if node is None or not has_form(node, len(dims), opset):
            barred.update(graph.widths.class_of(dim) for dim in dims)
    return {name for name in names if not barred & graph[name].labels.keys()}


def _mask_mixing(graph: OnnxGraph, side: Side, twins: dict[ir.Node, ir.Node]) -> None:
    """Operators that mix zeroed axes leave the removed indices out."""
    lowered, widths = graph.capture.lowered, graph.widths
    zeroed_axes = {number for name in side.zeroed.masks for number in graph[name].labels}
    for operator, dims in lowered.mixing.items():
        classes = {widths.class_of(dim) for dim in dims} & zeroed_axes
        old = lowered.operators.get(operator)
        source = None if old is None or not classes else lowered.operand(old, 0)
        if old is None or source is None:
            continue
        shape, mask = side.sliced.shape(source), np.ones((1,) * len(source.shape), dtype=bool)
        for d, dim in enumerate(source.dims):
            if widths.class_of(dim) in classes and len(gone := side.gone(dim)):
                mask = mask & _mask(shape, d, gone)
        if not mask.all():
            dtype = ir.DataType(graph.capture.evaluated.types[old.inputs[0]].tensor_type.elem_type)
            opset = graph.capture.evaluated.opset()
            FORMS[old.op_type](Masked(twins[old], mask, mask.size / int(mask.sum()), opset, dtype))


def _mask(shape: tuple[int, ...], d: int, gone: np.ndarray) -> np.ndarray:
    """True where a tensor of that shape stays, in its number of dims."""
    stays = np.ones(shape[d], dtype=bool)
    stays[gone] = False
    return stays.reshape([-1 if k == d else 1 for k in range(len(shape))])


def zero_of(graph: OnnxGraph, node: ir.Node, position: int, dtype: ir.DataType) -> ir.TensorProtocol:
    """What stands for zero in an operand: of quantised numbers, their zero point."""
    at = _ZERO_POINTS.get(node.op_type, {}).get(position)
    point = node.inputs[at] if at is not None and at < len(node.inputs) else None
    known = None if point is None else graph.capture.evaluated.known.get(point)
    number = np.zeros((), dtype=dtype.numpy()) if known is None else known.reshape(-1)[0].reshape(())
    return ir.tensor(number, dtype=dtype)


def fill(node: ir.Node, position: int, mask: np.ndarray, zero: ir.TensorProtocol, opset: int) -> None:
    """Zeros in an operand where the mask is false, for this operator only; old versions have no Where, but products."""
    value = node.inputs[position]
    assert value is not None and value.name
    base = f"{value.name}_{node.outputs[0].name}_{position}_stays_{mask.size}"
    if opset < HAS_WHERE:
        factors = ir.tensor(mask.astype(zero.numpy().dtype))
        filled = ir.node("Mul", [value, constant(node, f"{base}_mask", factors)], name=base)
    else:
        parts = [constant(node, f"{base}_mask", ir.tensor(mask)), value, constant(node, f"{base}_zero", zero)]
        filled = ir.node("Where", parts, name=base)
    filled.outputs[0].name = base
    filled.outputs[0].type = ir.TensorType(zero.dtype)
    node.prepend(filled)
    node.replace_input_with(position, filled.outputs[0])


def constant(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    made = ir.node("Constant", [], {"value": tensor}, name=name)
    made.outputs[0].name = name
    node.prepend(made)
    return made.outputs[0]
