"""Operators on complex tensors that torch's exporter lacks and that come to real ones: of either part, or of products of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops import core, linalg

from exporters.complex_operators import before, pairs, parts

Translation = Callable[..., Any]


def _apart(translation: Translation) -> Translation:
    """What is done to the real and to the imaginary part alike, as moving elements is."""

    def translated(self: Any, *rest: Any, **options: Any) -> Any:
        return pairs(*(translation(part, *rest, **options) for part in _known(self)))

    return translated


def _known(self: Any) -> tuple[Any, Any]:
    """The parts, whose shapes and types the translation may ask for."""
    both = parts(self)
    for part in both:
        part.shape, part.dtype = onnx_ir.Shape(list(self.shape)[:-1]), self.dtype
    return both


def _at_dim(translation: Translation) -> Translation:
    """What is done along one dim, the last of its arguments that the exporter gives by place."""

    def translated(self: Any, given: Any, dim: int = 0, **options: Any) -> Any:
        return translation(self, given, before(dim), **options)

    return translated


def _cumsum(self: Any, dim: int, dtype: Any = None) -> Any:
    return op.CumSum(self, op.Constant(value_int=before(dim)))


def _unbind(self: Any, dim: int = 0) -> Any:
    return core.aten_unbind(self, before(dim))


def _index_select(self: Any, dim: int, index: Any) -> Any:
    return op.Gather(self, index, axis=before(dim))


def _repeat(self: Any, repeats: Sequence[int]) -> Any:
    return core.aten_repeat(self, [*repeats, 1])


def _where(condition: Any, self: Any, other: Any) -> Any:
    return op.Where(op.Unsqueeze(condition, op.Constant(value_ints=[-1])), self, other)


def _masked_fill(self: Any, mask: Any, value: complex) -> Any:
    filled = (op.CastLike(op.Constant(value_float=part), self) for part in (complex(value).real, complex(value).imag))
    return _where(mask, pairs(*filled), self)


def _product(self: Any, other: Any) -> Any:
    """Of matrices."""
    (a, b), (c, d) = parts(self), parts(other)
    return pairs(op.Sub(op.MatMul(a, c), op.MatMul(b, d)), op.Add(op.MatMul(a, d), op.MatMul(b, c)))


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    made = _product(input, op.Transpose(weight, perm=[1, 0, 2]))
    return made if bias is None else op.Add(made, bias)


def _add_product(self: Any, one: Any, other: Any, beta: float = 1.0, alpha: float = 1.0) -> Any:
    if (beta, alpha) != (1, 1):
        raise NotImplementedError("sums with products of complex matrices are translated without factors")
    return op.Add(self, _product(one, other))


def _size(self: Any) -> Any:
    real, imaginary = parts(self)
    return op.Sqrt(op.Add(op.Mul(real, real), op.Mul(imaginary, imaginary)))


def _sign(self: Any) -> Any:
    size = op.Unsqueeze(_size(self), op.Constant(value_ints=[-1]))
    zero = op.CastLike(op.Constant(value_float=0.0), self)
    return op.Where(op.Equal(size, zero), zero, op.Div(self, size))


def _norm(self: Any, ord: float = 2.0, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: int = -1) -> Any:
    size = _size(self)
    size.shape, size.dtype = onnx_ir.Shape(list(self.shape)[:-1]), self.dtype
    return linalg.aten_linalg_vector_norm(size, ord, dim, keepdim, dtype)


PARTS: dict[str, Translation] = {
    "aten::tril": _apart(core.aten_tril),
    "aten::triu": _apart(core.aten_triu),
    "aten::gather": _apart(core.aten_gather),
    "aten::unfold": _apart(core.aten_unfold),
    "aten::split.Tensor": _at_dim(core.aten_split),
    "aten::split_with_sizes": _at_dim(core.aten_split_with_sizes),
    "aten::unbind.int": _unbind,
    "aten::cumsum": _cumsum,
    "aten::index_select": _index_select,
    "aten::repeat": _repeat,
    "aten::where.self": _where,
    "aten::masked_fill.Scalar": _masked_fill,
    "aten::mm": _product,
    "aten::linear": _linear,
    "aten::addmm": _add_product,
    "aten::baddbmm": _add_product,
    "aten::sgn": _sign,
    "aten::linalg_vector_norm": _norm,
}
"""Translations by the names that onnxscript registers them under."""
