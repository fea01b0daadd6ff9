"""What each operator says about the dims of its inputs and outputs: one row or one small function an operator."""

from depgraph.rules import (  # noqa: F401
    aten_backward,
    aten_contract,
    aten_conv,
    aten_elementwise,
    aten_index,
    aten_join,
    aten_left_alone,
    aten_matrix,
    aten_move,
    aten_norm,
    aten_recurrent,
    aten_reduce,
    aten_space,
    onnx_heads,
    onnx_own,
    onnx_shared,
    torchvision,
    vectorised,
)
from depgraph.rules.registry import Op, lookup, rule, table

__all__ = ["Op", "lookup", "rule", "table"]
