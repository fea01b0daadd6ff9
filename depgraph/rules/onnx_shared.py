"""Operators of ONNX that have a row under an ATen name: the same rule, with arguments by the names that it knows.

An operator of ONNX comes with ``inputs`` (its tensors by position, None where one is left out or only says how to compute),
``known`` (numbers of operands by position) and its attributes; ``opset`` is the version of its operator set, ``results`` are the
positions of its outputs that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from depgraph.graph import Value
from depgraph.rules.registry import Op, lookup, rule


def onnx(names: str) -> list[str]:
    """Names of ONNX operators without their prefix, apart by blanks, as `rule` wants them."""
    return [f"onnx.{name}" for name in names.split()]


def fused(names: str) -> list[str]:
    """The same for com.microsoft."""
    return [f"microsoft.{name}" for name in names.split()]


def operand(op: Op, position: int) -> Value | None:
    """The tensor at a position; None where it is left out."""
    inputs = op["inputs"]
    return inputs[position] if position < len(inputs) else None


def result(op: Op, position: int) -> Value | None:
    """The output at a position; None where it is left out."""
    positions = op["results"]
    return op.outputs[positions.index(position)] if position in positions else None


def setting(op: Op, name: str, position: int, otherwise: Any = None) -> Any:
    """A list of numbers that older versions have as an attribute and later ones as an operand; None where it isn't known."""
    if op.get(name) is not None:
        return list(op[name])
    if position in op["known"]:
        return np.asarray(op["known"][position]).reshape(-1).tolist()
    return None if position in op["given"] else otherwise


def as_aten(op: Op, target: str, **arguments: Any) -> None:
    """Let the rule of an ATen operator speak for this one."""
    function = lookup(target)
    assert function is not None, target
    function(replace(op, target=target, arguments=arguments, shown=op.target))


def windows(op: Op) -> dict[str, Any]:
    """How a convolution parts its channels and moves over space, as ATen says it; what is padded on either side is one number."""
    pads = list(op.get("pads", [0]))
    padding = [max(pair, key=abs) for pair in zip(pads[: (len(pads) + 1) // 2], pads[len(pads) // 2 :], strict=True)]
    moves = {"stride": op.get("strides", 1), "padding": padding, "output_padding": op.get("output_padding", 0)}
    return {"groups": op.get("group", 1), **moves}


Translate = Callable[[Op], dict[str, Any]]


def shared(names: list[str], target: str, translate: Translate) -> None:
    """Rows for operators that `translate` gives an ATen operator's arguments for."""
    rule(*names)(lambda op: as_aten(op, target, **translate(op)))


def _tensors(*names: str, **fixed: Any) -> Translate:
    """Operands by position under these names, and arguments that are always the same."""
    return lambda op: {**{name: operand(op, k) for k, name in enumerate(names)}, **fixed}


def _deformed(op: Op) -> dict[str, Any]:
    known = _tensors("input", "weight", "offset", "bias", "mask", groups=op.get("group", 1))(op)
    return {**known, "offset_groups": op.get("offset_group", 1), "use_mask": known["mask"] is not None}


_POINTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu
    Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf
    IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink
    Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor Bernoulli RandomNormalLike
    RandomUniformLike
"""
shared(onnx(_POINTWISE), "aten.where.self", lambda op: {"inputs": op["inputs"]})
shared(onnx("CastLike"), "aten.type_as.default", _tensors("self", "other"))
shared(fused("Gelu FastGelu QuickGelu BiasGelu BiasAdd"), "aten.where.self", lambda op: {"inputs": op["inputs"]})
shared(onnx("RandomNormal RandomUniform Shape Size"), "aten.full", lambda op: {})
shared(onnx("Range"), "aten.arange", lambda op: {})
shared(onnx("MatMul"), "aten.matmul", _tensors("self", "other"))
shared(onnx("Einsum"), "aten.einsum", lambda op: {"equation": op["equation"], "tensors": op["inputs"]})
shared(onnx("Conv"), "aten.convolution", lambda op: _tensors("input", "weight", "bias", **windows(op))(op))
shared(
    onnx("ConvTranspose"), "aten.conv_transpose2d", lambda op: _tensors("input", "weight", "bias", **windows(op))(op)
)
shared(onnx("DeformConv"), "torchvision.deform_conv2d", _deformed)
shared(
    onnx("BatchNormalization"),
    "aten.batch_norm",
    lambda op: _tensors("input", "weight", "bias", "running_mean", "running_var", training=op.get("training_mode"))(op),
)
shared(onnx("InstanceNormalization"), "aten.instance_norm", _tensors("input", "weight", "bias", use_input_stats=True))
shared(onnx("Reshape Flatten Squeeze Unsqueeze"), "aten.reshape", _tensors("self"))
shared(onnx("Expand"), "aten.expand", _tensors("self"))
shared(onnx("Tile"), "aten.tile", _tensors("self"))
shared(onnx("Transpose"), "aten.permute", lambda op: {"self": operand(op, 0), "dims": _order(op)})
shared(onnx("Concat"), "aten.cat", lambda op: {"tensors": op["inputs"], "dim": op.get("axis", 1)})
shared(onnx("Split"), "aten.split", lambda op: {"self": operand(op, 0), "dim": op.get("axis", 0)})
shared(onnx("Trilu"), "aten.tril", _tensors("self"))
shared(onnx("GridSample"), "aten.grid_sampler", _tensors("input", "grid"))
shared(
    onnx("ArgMax ArgMin"),
    "aten.argmax",
    lambda op: {"self": operand(op, 0), "dim": op.get("axis", 0), "keepdim": op.get("keepdims", 1)},
)
shared(
    onnx("NonZero NonMaxSuppression Unique Compress StringNormalizer TfIdfVectorizer Multinomial"),
    "aten.nonzero",
    lambda op: {"inputs": op["inputs"]},
)
shared(onnx("DFT STFT MelWeightMatrix Det EyeLike"), "aten.cov", lambda op: {"inputs": op["inputs"]})
shared(
    onnx("GatherElements"),
    "aten.gather",
    lambda op: {"self": operand(op, 0), "index": operand(op, 1), "dim": op.get("axis", 0)},
)
shared(
    onnx("ScatterElements Scatter"),
    "aten.scatter",
    lambda op: {"self": operand(op, 0), "index": operand(op, 1), "src": operand(op, 2), "dim": op.get("axis", 0)},
)


@rule("onnx.ConstantOfShape")
def alike(op: Op) -> None:
    """The same number at every index; where how many there are depends on the data, they can't follow a cut."""
    if 0 not in op["known"]:
        op.fix_all("its size is known at run time only")


def _order(op: Op) -> list[int]:
    rank = len(op.output.shape)
    return [int(d) for d in op.get("perm") or range(rank)[::-1]]


_REDUCED = {
    "ReduceSum": "aten.sum",
    "ReduceMean": "aten.mean",
    "ReduceMax": "aten.amax",
    "ReduceMin": "aten.amin",
    "ReduceProd": "aten.prod",
    "ReduceLogSumExp": "aten.logsumexp",
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare"), "aten.linalg_vector_norm"),
}


@rule(*onnx(" ".join(_REDUCED)))
def reduced(op: Op) -> None:
    """Without axes all dims are reduced, unless the operator says that none are."""
    axes = setting(op, "axes", 1, [])
    if axes is None:
        op.fix_all("over which dims is reduced is known at run time only")
    elif not axes and op.get("noop_with_empty_axes"):
        op.align_elementwise([*op.inputs, op.output])
    else:
        as_aten(op, _REDUCED[op.target.split(".")[1]], self=operand(op, 0), dim=[int(a) for a in axes] or None)


@rule(*onnx("Softmax LogSoftmax Hardmax LpNormalization"))
def softmax(op: Op) -> None:
    """Before version 13 all dims from `axis` on are normalised over together."""
    source, old = operand(op, 0), op["opset"] < 13 and op.target != "onnx.LpNormalization"
    assert source is not None
    axis = op.get("axis", 1 if old else -1) % max(len(source.shape), 1)
    op.align_elementwise([source, op.output])
    for d in range(axis, len(source.shape) if old else axis + 1):
        op.relations.mix(op.output.dim(d), f"{op.target.split('.')[1]} normalises over it")


@rule("onnx.LayerNormalization", "onnx.RMSNormalization", "onnx.SimplifiedLayerNormalization")
@rule("microsoft.SimplifiedLayerNormalization")
def layer_norm(op: Op) -> None:
    source = operand(op, 0)
    assert source is not None
    axis = op.get("axis", -1) % len(source.shape)
    as_aten(
        op,
        "aten.layer_norm",
        input=source,
        weight=operand(op, 1),
        bias=operand(op, 2),
        normalized_shape=source.shape[axis:],
    )


@rule("onnx.GroupNormalization")
def group_norm(op: Op) -> None:
    """Scale and bias are of the groups before version 21, of the channels since."""
    source, scale, bias = (operand(op, k) for k in range(3))
    assert source is not None and scale is not None
    groups = int(op["num_groups"])
    if len(scale.dims) and scale.shape[0] == source.shape[1]:
        as_aten(op, "aten.group_norm", input=source, weight=scale, bias=bias, num_groups=groups)
        return
    as_aten(op, "aten.group_norm", input=source, weight=None, bias=None, num_groups=groups)
    op.relate("n (g c) ..., g, g -> n (g c) ...", source, scale, bias)


@rule(*onnx("GlobalAveragePool GlobalMaxPool GlobalLpPool AveragePool LpPool MaxPool"))
def pool(op: Op) -> None:
    """x [n, c, space] -> [n, c, less space]; a second result says where in all of x the maxima were."""
    for value in [*op.inputs, *op.outputs]:
        for d in range(len(value.shape)):
            if d > 1 or len(op.outputs) > 1:
                op.fix(value, d, "it is a spatial dimension" if d > 1 else "the operator counts where the maxima are")
            else:
                op.relations.align(value.dim(d), op.output.dim(d))


@rule("onnx.TopK")
def top(op: Op) -> None:
    source = operand(op, 0)
    count = setting(op, "k", 1) if not isinstance(op.get("k"), int) else [op["k"]]
    assert source is not None
    if count is None or not source.shape:
        op.fix_all("how many are picked is known at run time only")
    else:
        as_aten(op, "aten.topk", self=source, dim=op.get("axis", -1), k=int(count[0]))


@rule("onnx.CumSum")
def running_total(op: Op) -> None:
    along = setting(op, "axis", 1)
    if along is None:
        op.fix_all("along which dim is added up is known at run time only")
    else:
        as_aten(op, "aten.cumsum", self=operand(op, 0), dim=int(along[0]))
