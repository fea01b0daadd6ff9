"""Attention in ONNX: torch's translations take batches of heads, and have the mean of all values where a query may look at no key."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import onnx_ir
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops import nn

_AS_ONE = 23  # the operator set with attention as one operator
_DIMS = 4  # batch, heads, tokens, features


def attention(opset: int) -> Callable[..., Any]:
    """The translation of `scaled_dot_product_attention`, of tensors of any number of dims."""
    one = _attention_at_23() if opset >= _AS_ONE else None
    of_heads = partial(_of_heads, one or nn.aten_scaled_dot_product_attention)
    return partial(_of_any_dims, of_heads)


@cache
def _attention_at_23() -> Any:
    """torch's own translation into one operator; None where a later torch keeps it elsewhere."""
    try:
        module: Any = importlib.import_module("torch.onnx._internal.exporter._torchlib.ops.nn")
    except ImportError:
        return None
    return getattr(module, "aten_scaled_dot_product_attention_23", None)


def _of_heads(
    translated: Callable[..., Any],
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *rest: Any,
    enable_gqa: bool = False,
    **options: Any,
) -> Any:
    """As torch translates it, but heads are shared where there are fewer keys, and only there, whatever the caller said.

    A query that may look at no key, as that of a padding token, gives zeros as in torch, and not the mean of all values.
    """
    shared = query.shape[1] != key.shape[1]
    made = translated(query, key, value, attn_mask, *rest, enable_gqa=shared, **options)
    if attn_mask is None or attn_mask.dtype != onnx_ir.DataType.BOOL:
        return made
    keys = op.Cast(attn_mask, to=onnx_ir.DataType.INT32)
    looks = op.Cast(op.ReduceMax(keys, op.Constant(value_ints=[-1]), keepdims=1), to=onnx_ir.DataType.BOOL)
    return op.Where(looks, made, op.CastLike(op.Constant(value_float=0.0), made))


def _of_any_dims(
    of_heads: Callable[..., Any], query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
) -> Any:
    """Tensors without heads are given one, and dims before the batch are folded into it."""
    dims = len(query.shape)
    if dims == _DIMS:
        return of_heads(query, key, value, attn_mask, *rest, **options)
    if not len(key.shape) == len(value.shape) == dims:
        raise NotImplementedError("attention is translated for queries, keys and values of as many dims")
    if attn_mask is not None and len(attn_mask.shape) >= min(dims, _DIMS):
        over = op.Concat(op.Shape(query, end=-1), op.Shape(key, start=-2, end=-1), axis=0)
        mask = _as_heads(_known(op.Expand(attn_mask, over), attn_mask, [*query.shape[:-1], key.shape[-2]]))
    else:
        mask = attn_mask
    made = of_heads(*map(_as_heads, (query, key, value)), mask, *rest, **options)
    return op.Reshape(made, op.Concat(op.Shape(query, end=-1), op.Shape(value, start=-1), axis=0))


def _as_heads(tensor: Any) -> Any:
    """[tokens, features] or [batch, tokens, features] as of one head; further dims in front as one."""
    dims = len(tensor.shape)
    if dims < _DIMS:
        front = op.Constant(value_ints=[1] * (_DIMS - dims) if dims < _DIMS - 1 else [-1, 1])
        last, sizes = 2, [None if dims == _DIMS - 1 else 1, 1]
    else:
        front, last, sizes = op.Constant(value_ints=[-1]), 3, [None]
    folded = op.Reshape(tensor, op.Concat(front, op.Shape(tensor, start=-last), axis=0))
    return _known(folded, tensor, [*sizes, *tensor.shape[-last:]])


def _known(made: Any, like: Any, sizes: list[Any]) -> Any:
    made.shape, made.dtype = onnx_ir.Shape(sizes), like.dtype
    return made
