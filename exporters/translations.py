"""Operators that torch's exporter lacks a translation for, or translates for some sizes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import onnx_ir
import torch
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib import registration
from onnxscript.function_libs.torch_lib.ops import core, nn

from exporters import pooling
from exporters.attention import attention
from exporters.batch_statistics import batch_norm
from exporters.complex_operators import COMPLEX, zeros
from exporters.complex_parts import PARTS

_aten = torch.ops.aten
_INDICES = (onnx_ir.DataType.INT64, onnx_ir.DataType.BOOL)
_GILES_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_GILES_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def table(opset: int) -> dict[Any, Callable[..., Any]]:
    """Translations by operator, as torch.onnx.export takes them; those of complex tensors are registered with onnxscript."""
    _register_complex()
    found: dict[Any, Callable[..., Any]] = {
        _aten.scaled_dot_product_attention.default: attention(opset),
        _aten._native_batch_norm_legit_functional.default: batch_norm,
        _aten.squeeze.dim: _squeeze,
        _aten.squeeze.dims: _squeeze_dims,
        _aten.sort.stable: _sort_stable,
        _aten.topk.default: _topk,
        _aten.erfinv.default: _erfinv,
        _aten.zeros.default: zeros,
        _aten._is_all_true.default: core.aten_all,
        _aten._is_any_true.default: core.aten_any,
        _aten.einsum.default: _einsum,
        _aten.index_put.default: _index_put,
        _aten._unsafe_index_put.default: _index_put,
        _aten._cdist_forward.default: _cdist,
        _aten._linalg_slogdet.default: _slogdet,
        torch.ops.prims.prod.default: _prod,
        _aten.rrelu_with_noise_functional.default: _rrelu,
        **pooling.table(_aten),
    }
    experts = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # there once transformers is imported
    if experts is not None:
        found[experts.default] = _grouped_mm
    return found


def _squeeze(self: Any, dim: int) -> Any:
    """Drop a dim, if it has size 1: one that is free wasn't 1 when the model was traced."""
    return _squeeze_dims(self, (dim,))


def _squeeze_dims(self: Any, dim: Sequence[int]) -> Any:
    ones = [d for d in dim if self.shape and self.shape[d] == 1]
    return op.Squeeze(self, ones) if ones else op.Identity(self)


def _sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """ONNX puts equal values in the order of their positions."""
    return core.aten_sort(self, dim, descending, True)


def _topk(self: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """In order, whether asked or not: then the file gives the same everywhere."""
    return core.aten_topk(self, k, dim, largest, True)


def _index_put(self: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    """ONNX takes 64-bit indices only."""
    return core.aten_index_put(self, [_wide(index) for index in indices], values, accumulate)


def _wide(index: Any) -> Any:
    if index is None or index.dtype in _INDICES:
        return index
    wide = op.Cast(index, to=onnx_ir.DataType.INT64)
    wide.shape, wide.dtype = index.shape, onnx_ir.DataType.INT64
    return wide


def _einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:
    """ONNX sums no booleans: masks are numbers like what they are multiplied with, and what masks alone give is one."""
    masks = [tensor.dtype == onnx_ir.DataType.BOOL for tensor in tensors]
    if not any(masks):
        return op.Einsum(*tensors, equation=equation)
    if all(masks):
        counted = op.Einsum(*(op.Cast(t, to=onnx_ir.DataType.INT32) for t in tensors), equation=equation)
        return op.Cast(counted, to=onnx_ir.DataType.BOOL)
    like = tensors[masks.index(False)]
    alike = (op.CastLike(t, like) if mask else t for t, mask in zip(tensors, masks, strict=True))
    return op.Einsum(*alike, equation=equation)


def _slogdet(A: Any) -> Any:
    """The sign of a determinant and the logarithm of its size; what torch keeps for a gradient isn't made."""
    found = op.CastLike(op.Det(op.Cast(A, to=onnx_ir.DataType.FLOAT)), A)
    return op.Sign(found), op.Log(op.Abs(found)), op.Identity(A), op.Identity(A)


def _prod(inp: Any, dims: Sequence[int] | None, *, output_dtype: Any = None) -> Any:
    """As cumulative products come to."""
    made = op.ReduceProd(inp, None if dims is None else list(dims), keepdims=0)
    return made


def _rrelu(
    self: Any, noise: Any, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, **options: Any
) -> Any:
    """Draws its slopes in training only, and has their mean else."""
    return op.LeakyRelu(self, alpha=(lower + upper) / 2), op.Identity(noise)


def _cdist(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:
    """The p-norm of each row of the first less each row of the second."""
    apart = op.Abs(op.Sub(op.Unsqueeze(x1, [-2]), op.Unsqueeze(x2, [-3])))
    if p == 0:
        return op.ReduceSum(op.CastLike(op.Cast(apart, to=onnx_ir.DataType.BOOL), x1), [-1], keepdims=0)
    if p == 1:
        return op.ReduceSum(apart, [-1], keepdims=0)
    if p == float("inf"):
        return op.ReduceMax(apart, [-1], keepdims=0)
    power = op.Constant(value=onnx_ir.tensor(p, dtype=x1.dtype))
    return op.Pow(op.ReduceSum(op.Pow(apart, power), [-1], keepdims=0), op.Reciprocal(power))


def _erfinv(self: Any) -> Any:
    """M. Giles, "Approximating the erfinv function" (2010), to single precision: two polynomials in -log(1 - x * x)."""

    def constant(value: float) -> Any:
        return op.Constant(value=onnx_ir.tensor(value, dtype=self.dtype))

    def polynomial(variable: Any, coefficients: Sequence[float]) -> Any:
        value = constant(coefficients[0])
        for coefficient in coefficients[1:]:
            value = op.Add(op.Mul(value, variable), constant(coefficient))
        return value

    one = constant(1.0)
    depth = op.Neg(op.Log(op.Mul(op.Sub(one, self), op.Add(one, self))))
    centre = polynomial(op.Sub(depth, constant(2.5)), _GILES_CENTRE)
    tail = polynomial(op.Sub(op.Sqrt(depth), constant(3.0)), _GILES_TAIL)
    within = op.Mul(op.Where(op.Less(depth, constant(5.0)), centre, tail), self)
    end = op.Equal(op.Abs(self), one)
    return op.Where(end, op.Mul(self, constant(float("inf"))), within)


def _grouped_mm(input: Any, weight: Any, offs: Any) -> Any:
    """Rows `offs[g - 1]:offs[g]` times matrix g; rows past the last offset are zero.

    Each group is one product, so no matrix is repeated for its rows.
    """
    groups, width = weight.shape[0], weight.shape[2]
    if not isinstance(groups, int) or not isinstance(width, int):
        raise NotImplementedError("a grouped product is translated for a fixed number of groups and outputs")
    rows = op.Shape(input, start=0, end=1)
    ends = op.Cast(offs, to=onnx_ir.DataType.INT64)
    bounds = [op.Constant(value_ints=[0]), *(op.Slice(ends, [g], [g + 1]) for g in range(groups)), rows]
    parts = [op.Slice(input, bounds[g], bounds[g + 1], [0]) for g in range(groups)]
    products = [op.MatMul(part, op.Gather(weight, g, axis=0)) for g, part in enumerate(parts)]
    left = op.Concat(op.Sub(rows, bounds[groups]), op.Constant(value_ints=[width]), axis=0)
    zeros = op.Expand(op.CastLike(op.Constant(value_float=0.0), input), left)
    return op.Concat(*products, zeros, axis=0)


def _complex_unsqueeze(self: Any, dim: int) -> Any:
    return core.aten_unsqueeze(self, dim if dim >= 0 else dim - 1)


def _complex_expand(self: Any, size: Sequence[Any], implicit: bool = False) -> Any:
    return core.aten_expand(self, [*size, 2], implicit)


def _complex_select(self: Any, dim: int, index: int) -> Any:
    return core.aten_select(self, dim if dim >= 0 else dim - 1, index)


def _complex_index(self: Any, indices: Sequence[Any]) -> Any:
    return core.aten_index(self, indices)


def _complex_pad(self: Any, pad: Sequence[Any], mode: str = "constant", value: float | None = None) -> Any:
    if value:
        raise NotImplementedError("complex tensors are padded with zeros, or with what they hold")
    return nn.aten_pad(self, [0, 0, *pad], mode)


def _complex_constant_pad(self: Any, pad: Sequence[Any], value: float = 0.0) -> Any:
    return _complex_pad(self, pad, value=value)


@cache
def _register_complex() -> None:
    """Say how views of complex tensors are views of pairs: torch.onnx.export takes translations of real tensors only."""
    for name, translation in (
        ("aten::unsqueeze", _complex_unsqueeze),
        ("aten::expand", _complex_expand),
        ("aten::select.int", _complex_select),
        ("aten::index.Tensor", _complex_index),
        *COMPLEX.items(),
        *PARTS.items(),
        ("aten::pad", _complex_pad),
        ("aten::constant_pad_nd", _complex_constant_pad),
    ):
        held = registration.default_registry
        if name not in held or not held[name].complex:
            registration.torch_op(name, trace_only=True, complex=True)(translation)
