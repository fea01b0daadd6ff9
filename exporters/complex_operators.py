"""Operators on complex tensors that torch's exporter lacks: a file has pairs of numbers, in a last dim of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops import core

_LARGEST_POWER = 8
_REAL = {
    onnx_ir.DataType.COMPLEX64: onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.COMPLEX128: onnx_ir.DataType.DOUBLE,
}


def parts(pairs: Any) -> tuple[Any, Any]:
    """The real and the imaginary part."""
    real, imaginary = (op.Gather(pairs, op.Constant(value_int=k), axis=-1) for k in (0, 1))
    return real, imaginary


def pairs(real: Any, imaginary: Any) -> Any:
    """A complex tensor of its parts."""
    last = op.Constant(value_ints=[-1])
    return op.Concat(op.Unsqueeze(real, last), op.Unsqueeze(imaginary, last), axis=-1)


def _einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:
    """The real and the imaginary parts apart."""
    both = [parts(tensor) for tensor in tensors]
    if len(both) > 2:
        raise NotImplementedError("a sum over complex products is translated for two operands")

    def summed(*chosen: Any) -> Any:
        return op.Einsum(*chosen, equation=equation)

    if len(both) == 1:
        return pairs(*(summed(part) for part in both[0]))
    (a, b), (c, d) = both
    return pairs(op.Sub(summed(a, c), summed(b, d)), op.Add(summed(a, d), summed(b, c)))


def times(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    (a, b), (c, d) = one, other
    return op.Sub(op.Mul(a, c), op.Mul(b, d)), op.Add(op.Mul(a, d), op.Mul(b, c))


def _times_number(self: Any, other: complex) -> Any:
    real, imaginary = (
        op.CastLike(op.Constant(value_float=part), self) for part in (complex(other).real, complex(other).imag)
    )
    return pairs(*times(parts(self), (real, imaginary)))


def _exp(self: Any) -> Any:
    real, imaginary = parts(self)
    size = op.Exp(real)
    return pairs(op.Mul(size, op.Cos(imaginary)), op.Mul(size, op.Sin(imaginary)))


def _power(self: Any, exponent: complex) -> Any:
    """Of a small whole number: products."""
    if exponent not in range(1, _LARGEST_POWER + 1):
        raise NotImplementedError(f"complex tensors are raised to whole numbers up to {_LARGEST_POWER}")
    made = base = parts(self)
    for _ in range(int(complex(exponent).real) - 1):
        made = times(made, base)
    return pairs(*made)


def _copy(self: Any, src: Any, non_blocking: bool = False) -> Any:
    return op.Expand(op.CastLike(src, self), op.Shape(self))


def _slice_scatter(self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    return core.aten_slice_scatter(self, src, before(dim), start, end, step)


def _select_scatter(self: Any, src: Any, dim: int, index: int) -> Any:
    return core.aten_select_scatter(self, src, before(dim), index)


def zeros(size: Sequence[Any], dtype: Any = None, **options: Any) -> Any:
    """Of complex numbers, which a file has as pairs: as torch translates others."""
    real = _REAL.get(dtype)
    if real is not None:
        return core.aten_zeros([*size, 2], real)
    return core.aten_zeros(size, onnx_ir.DataType.FLOAT if dtype is None else dtype)


def _new_zeros(self: Any, size: Sequence[Any], dtype: Any = None, **options: Any) -> Any:
    """Complex numbers, unless another type is asked for."""
    pairs = dtype is None or dtype in _REAL
    made = core.aten_zeros([*size, 2] if pairs else size, onnx_ir.DataType.FLOAT if pairs else dtype)
    return op.CastLike(made, self) if pairs else made


def _tanh(self: Any) -> Any:
    """With t = tanh a and s = tan b, that of a + ib is (t + is) / (1 + its)."""
    real, imaginary = parts(self)
    t, s = op.Tanh(real), op.Tan(imaginary)
    tt, ss = op.Mul(t, t), op.Mul(s, s)
    one = op.CastLike(op.Constant(value_float=1.0), real)
    size = op.Add(one, op.Mul(tt, ss))
    return pairs(op.Div(op.Mul(t, op.Add(one, ss)), size), op.Div(op.Mul(s, op.Sub(one, tt)), size))


def _zeros_like(self: Any, dtype: Any = None, **options: Any) -> Any:
    """Complex numbers, unless another type is asked for."""
    if dtype is None or dtype in _REAL:
        return op.Expand(op.CastLike(op.Constant(value_float=0.0), self), op.Shape(self))
    return op.Expand(op.Cast(op.Constant(value_float=0.0), to=dtype), op.Shape(self, end=-1))


def before(dim: int) -> int:
    """A dim that counts from the end, before that of the pairs."""
    return dim if dim >= 0 else dim - 1


def _alias(self: Any) -> Any:
    return op.Identity(self)


COMPLEX: dict[str, Callable[..., Any]] = {
    "aten::alias": _alias,
    "aten::einsum": _einsum,
    "aten::copy": _copy,
    "aten::mul.Scalar": _times_number,
    "aten::exp": _exp,
    "aten::tanh": _tanh,
    "aten::pow.Tensor_Scalar": _power,
    "aten::slice_scatter": _slice_scatter,
    "aten::select_scatter": _select_scatter,
    "aten::new_zeros": _new_zeros,
    "aten::zeros_like": _zeros_like,
}
"""Translations by the names that onnxscript registers them under."""
