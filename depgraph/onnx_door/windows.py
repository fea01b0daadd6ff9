"""How a convolution of a file moves over space, and the bias that an operator adds to what it puts out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_ir as ir

from depgraph.onnx_door.evaluating import attribute
from depgraph.onnx_door.operands import stored
from depgraph.onnx_door.steps import Step

if TYPE_CHECKING:
    from depgraph.onnx_door.lowering import Lowered

_CONVOLVES = frozenset(["Conv", "FusedConv"])
_OF_CHANNELS = _CONVOLVES | {"ConvTranspose"}
_THIRD = _OF_CHANNELS | {"Gemm", "FusedGemm"}


def window_of_file(step: Step, space: tuple[int, ...]) -> dict[str, tuple[Any, ...]] | None:
    """Size, stride, dilation and padding (before, after) of a convolution, for inputs of these sizes; None for others."""
    node = step.operator
    weight = None if node is None or len(node.inputs) < 2 else node.inputs[1]
    if node is None or node.op_type not in _CONVOLVES or weight is None or weight.shape is None:
        return None
    given = attribute(node, "kernel_shape", None)
    size = tuple(int(n) for n in (given if given is not None else list(weight.shape)[2:]))  # type: ignore[arg-type]
    stride, dilation = (tuple(attribute(node, n, [1] * len(size))) for n in ("strides", "dilations"))
    pads = _pads(node, size, (stride, dilation), space)
    return {"size": size, "stride": stride, "dilation": dilation, "padding": pads}


def moves_of_file(step: Step, space: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    """Stride, dilation and padding before of a convolution with so many dims of space, and whether it is a transposed one."""
    node = step.operator
    assert node is not None
    stride, dilation = (tuple(attribute(node, n, [1] * space)) for n in ("strides", "dilations"))
    before = tuple(int(n) for n in attribute(node, "pads", [0] * 2 * space))[:space]
    return stride, dilation, before, node.op_type == "ConvTranspose"


def groups_of_file(step: Step) -> int | None:
    """Into how many parts a convolution, transposed or not, parts its channels; None for other operators."""
    node = step.operator
    if node is None or node.op_type not in _OF_CHANNELS:
        return None
    return int(attribute(node, "group", 1))


def _pads(
    node: ir.Node, size: tuple[int, ...], steps: tuple[tuple[int, ...], tuple[int, ...]], space: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    how = str(attribute(node, "auto_pad", "NOTSET"))
    if how in ("NOTSET", ""):
        pads = [int(n) for n in attribute(node, "pads", [0] * 2 * len(size))]
        return tuple(zip(pads[: len(size)], pads[len(size) :], strict=True))
    if how == "VALID" or not space:
        return ((0, 0),) * len(size)
    found = []
    for n, window, stride, dilation in zip(space, size, *steps, strict=True):
        short = max((-(-n // stride) - 1) * stride + (window - 1) * dilation + 1 - n, 0)
        less, more = short // 2, short - short // 2
        found.append((less, more) if how == "SAME_UPPER" else (more, less))
    return tuple(found)


class Bias(NamedTuple):
    """The operand of an operator that adds a vector to what a product puts out; `position` where it would be, if there is none.

    `node` is None where the vector needs an addition of its own, after the product.
    """

    node: ir.Node | None
    position: int
    there: bool


def bias_at(lowered: Lowered, op: str) -> Bias | None:
    """Where an operator's bias is, or can be; None where it can have none."""
    node = lowered.operators[op]
    if node.op_type in _THIRD:
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is None:
            return Bias(node, 2, False) if plain else None
        return Bias(node, 2, True) if plain and _is_vector(given, lowered, node.outputs[0]) else None
    weight = node.inputs[1] if node.op_type == "MatMul" and node.inputs[1] is not None else None
    if weight is None or lowered.operand(node, 1) is None or len(lowered.operand(node, 1).shape) != 2:  # type: ignore[union-attr]
        return None
    uses = [*node.outputs[0].uses()]
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not node.outputs[0].is_graph_output():
        add, position = uses[0].node, 1 - uses[0].idx
        other = add.inputs[position]
        if other is not None and stored(other) is not None and _is_vector(other, lowered, node.outputs[0]):
            return Bias(add, position, True)
    return Bias(None, 1, False)


def _is_vector(value: ir.Value, lowered: Lowered, made: ir.Value) -> bool:
    """Does the file hold one number for every channel of what an operator makes?"""
    tensor, result = stored(value), lowered.values.get(made)
    if tensor is None or result is None or len(tensor.shape) != 1 or not tensor.dtype.is_floating_point():
        return False
    channel = 1 if made.producer().op_type in _OF_CHANNELS else len(result.shape) - 1  # type: ignore[union-attr]
    return int(tensor.shape[0]) == result.shape[channel]  # type: ignore[arg-type]
