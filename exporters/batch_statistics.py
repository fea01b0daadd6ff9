"""Batch normalisation by the batch's own mean and variance, in eval mode too (`F.batch_norm(..., training=True)`).

The translation that onnxscript has takes running statistics where they are given, whatever `training` says.
"""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops import core


def batch_norm(input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, *how: Any) -> Any:
    """aten::_native_batch_norm_legit_functional: the result, mean and inverse deviation; a file leaves running statistics alone.

    `how` is whether to take the batch's statistics, the momentum of the running ones, and what is added to the variance.
    """
    training, _, eps = how
    if not training:
        return core.aten__native_batch_norm_legit_functional(input, weight, bias, running_mean, running_var, *how)
    axes = op.Constant(value_ints=[d for d in range(len(input.shape)) if d != 1])
    mean = op.ReduceMean(input, axes)
    apart = op.Sub(input, mean)
    variance = op.ReduceMean(op.Mul(apart, apart), axes)
    deviation = op.Sqrt(op.Add(variance, op.CastLike(op.Constant(value_float=eps), input)))
    made = op.Div(apart, deviation)
    if weight is not None:
        made = op.Mul(made, _beside(weight, len(input.shape)))
    if bias is not None:
        made = op.Add(made, _beside(bias, len(input.shape)))
    inverse = op.Reciprocal(op.Squeeze(deviation, axes))
    return made, op.Squeeze(mean, axes), inverse, op.Identity(running_mean), op.Identity(running_var)


def _beside(row: Any, ndim: int) -> Any:
    """One number a channel, where channels are dim 1 of `ndim`."""
    return op.Reshape(row, op.Constant(value_ints=[1, -1, *[1] * (ndim - 2)]))
