"""torch's exporter makes a tensor of a bound whose type isn't the operand's, and finds no clamp that takes a tensor and a number.

So `clamp(x, 0, 1.0)` fails, though `clamp(x, 0.0, 1.0)` doesn't.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CLAMPS = frozenset([torch.ops.aten.clamp.default, torch.ops.aten.clamp_.default])


@contextmanager
def bounds_of_one_type() -> Iterator[None]:
    """Within, whole numbers that bound floating numbers are written as floating numbers."""
    owner = _promoting()
    if owner is None:
        yield
        return
    before = owner._maybe_promote_arg

    def promote(self: Any, node: torch.fx.Node, arg: Any, dtype: torch.dtype | None) -> Any:
        number = dtype is not None and dtype.is_floating_point and type(arg) in (int, float)
        return float(arg) if number and node.target in _CLAMPS else before(self, node, arg, dtype)

    owner._maybe_promote_arg = promote
    try:
        yield
    finally:
        owner._maybe_promote_arg = before


def _promoting() -> Any:
    """What promotes the operands of an exported graph; None where another torch keeps it elsewhere."""
    try:
        from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter
    except ImportError:
        return None
    return _TypePromotionInterpreter if hasattr(_TypePromotionInterpreter, "_maybe_promote_arg") else None
