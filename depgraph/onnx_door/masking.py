"""Operators that mix a whole dim (means, norms, softmax), in a form that leaves the removed indices out.

With these, an axis that is mixed is compared with the original too: what a mean or a norm makes of the kept indices alone
is what it makes after the cut. An axis that goes through any other mixing operator is compared with itself, cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import onnx_ir as ir

_LARGE = {ir.DataType.FLOAT16: 6e4}
_FILLED = {
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare"), 0.0),
    **dict.fromkeys(("Softmax", "LogSoftmax", "ReduceMax", "ReduceLogSumExp"), -1.0),
    "ReduceMin": 1.0,
}
"""What stands in for removed indices, as a share of the largest number."""
_NUMBERS = count()


@dataclass
class Masked:
    """An operator of the copy; `mask` is true where its first operand stays, in that operand's number of dims.

    `ratio` is how many indices it mixes, to how many of them stay; `opset` the version of the operator set.
    """

    node: ir.Node
    mask: np.ndarray
    ratio: float
    opset: int
    dtype: ir.DataType

    @property
    def source(self) -> ir.Value:
        assert self.node.inputs[0] is not None
        return self.node.inputs[0]

    def op(self, kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """A further operator before this one."""
        made = ir.node(kind, list(inputs), attributes, name=f"depgraph_masked_{next(_NUMBERS)}")  # type: ignore[arg-type]
        made.outputs[0].name = f"{made.name}_out"
        self.node.prepend(made)
        return made.outputs[0]

    def number(self, value: object, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant."""
        kind = dtype or self.dtype
        return self.op("Constant", value=ir.tensor(np.asarray(value, dtype=kind.numpy()), dtype=kind))

    def stays(self, value: ir.Value, otherwise: float = 0.0) -> ir.Value:
        """A value, with another number in the place of removed indices."""
        return self.op("Where", self.number(self.mask, ir.DataType.BOOL), value, self.number(otherwise))

    def mean(self, value: ir.Value) -> ir.Value:
        """The mean of what stays over the last dim, of a value that holds zeros elsewhere."""
        axes = {"axes": [-1]} if self.opset < 18 else {}
        more = [] if axes else [self.number([-1], ir.DataType.INT64)]
        return self.op("Mul", self.op("ReduceMean", value, *more, keepdims=1, **axes), self.number(self.ratio))

    def replace(self, value: ir.Value) -> None:
        """Let something else take the place, and the name, of the operator's result."""
        made = self.node.outputs[0]
        made.replace_all_uses_with(value, replace_graph_outputs=True)
        name, made.name = made.name, f"{made.name}_unmasked"
        value.name = name


def _fill(op: Masked) -> None:
    largest = _LARGE.get(op.dtype, 1e30)
    op.node.replace_input_with(0, op.stays(op.source, _FILLED[op.node.op_type] * largest))


def _mean(op: Masked) -> None:
    """A mean of zeros where indices are gone, times how many there are to how many stay."""
    op.node.replace_input_with(0, op.stays(op.source))
    made, ratio = op.node.outputs[0], op.number(op.ratio)
    product = ir.Node("", "Mul", [], num_outputs=1, name=f"depgraph_masked_{next(_NUMBERS)}")
    op.node.append(product)
    op.replace(product.outputs[0])
    product.resize_inputs(2)
    product.replace_input_with(0, made)
    product.replace_input_with(1, ratio)


def _norm(op: Masked) -> None:
    """Layer norm (with a mean) or RMS norm (without), written out."""
    centred = op.node.op_type == "LayerNormalization"
    here = op.stays(op.source)
    if centred:
        here = op.stays(op.op("Sub", op.source, op.mean(here)))
    found = op.node.attributes.get("epsilon")
    deep = op.op("Add", op.mean(op.op("Mul", here, here)), op.number(1e-5 if found is None else found.value))
    made = op.op("Div", here, op.op("Sqrt", deep))
    for kind, value in zip(("Mul", "Add"), op.node.inputs[1:], strict=False):
        if value is not None:
            made = op.op(kind, made, value)
    op.replace(made)


FORMS: dict[str, Callable[[Masked], None]] = {
    **dict.fromkeys(_FILLED, _fill),
    "ReduceMean": _mean,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "SimplifiedLayerNormalization": _norm,
}


def has_form(node: ir.Node, mixed: int, opset: int) -> bool:
    """Is there a form of an operator that mixes so many dims?"""
    plain = opset >= 13 or node.op_type not in ("Softmax", "LogSoftmax")
    norm = FORMS.get(node.op_type) is not _norm or (mixed == 1 and not any(v.uses() for v in node.outputs[1:]))
    return node.op_type in FORMS and plain and norm and opset >= 9
