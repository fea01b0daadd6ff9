"""Gradients that a forward takes itself, as energy models and inner training steps do: they follow what they are gradients of.

The pointwise ones are in `aten_elementwise.py`.
"""

from __future__ import annotations

from depgraph.rules.aten_conv import SLIDES, along_space
from depgraph.rules.aten_space import spatial_of
from depgraph.rules.registry import Op, aten, rule


@rule("aten._softmax_backward_data", "aten._log_softmax_backward_data")
def softmax_backward(op: Op) -> None:
    op.align_elementwise([op["grad_output"], op["output"], op.output])
    if op.output.shape:
        op.relations.mix(op.output.dim(op["dim"]), "softmax normalises over it")


@rule("aten.native_layer_norm_backward")
def layer_norm_backward(op: Op) -> None:
    """Statistics and gradients of weights have a part of the dims of `input`."""
    source = op["input"]
    for value in (op["grad_out"], op["mean"], op["rstd"], op.get("weight"), op.get("bias"), *op.outputs):
        if value is not None:
            op.align_elementwise([source, value])
    for d in range(-len(op["normalized_shape"]), 0):
        op.relations.mix(source.dim(d), "the gradient of a normalisation averages over it")


@rule("aten.native_group_norm_backward")
def group_norm_backward(op: Op) -> None:
    """grad and x [n, g·c, ...], statistics [n, g] -> the gradients of x, of weight and of bias [g·c]."""
    wanted = op["output_mask"]
    made = [term for term, one in zip(("n (g c) ...", "(g c)", "(g c)"), wanted, strict=True) if one]
    operands = [op["grad_out"], op["input"], op["mean"], op["rstd"], op.get("weight")]
    op.relate(f"n (g c) ..., n (g c) ..., n g, n g, (g c) -> {', '.join(made)}", *operands, g=op["group"])
    source, relations = op["input"], op.relations
    part = relations.new_dim(source.shape[1] // op["group"])
    relations.fold(source.dim(1), [op["mean"].dim(1), part])
    for dim in (part, *source.dims[2:]):
        relations.mix(dim, "the gradient of a normalisation averages over it")


@rule("aten.native_batch_norm_backward")
def batch_norm_backward(op: Op) -> None:
    """grad and x [n, c, ...] -> the gradients of x, of weight and of bias [c]; in training the batch is averaged over."""
    made = [t for t, one in zip(("n c ...", "c", "c"), op["output_mask"], strict=True) if one]
    stored = [op.get(name) for name in ("weight", "running_mean", "running_var", "save_mean", "save_invstd")]
    stored = [None if value is None or value.shape == (0,) else value for value in stored]
    op.relate(f"n c ..., n c ..., c, c, c, c, c -> {', '.join(made)}", op["grad_out"], op["input"], *stored)
    if op["train"]:
        for d in range(len(op["input"].shape)):
            if d != 1:
                op.relations.mix(op["input"].dim(d), "batch norm in training mode averages over it")


@rule("aten.convolution_backward")
def convolution_backward(op: Op) -> None:
    """grad [n, g·o, space], x [n, g·i, space], W [g·o, i, kernel] -> the gradients of x, of W and of b [g·o]."""
    weight, groups = op["weight"], op["groups"]
    if op["transposed"]:
        op.fix_all("the gradient of a transposed convolution isn't looked into")
        return
    inward, outward = ("i", "o") if groups == 1 else ("(g i)", "(g o)")
    kernel = " ".join(f"k{d}!" for d in range(len(weight.shape) - 2))
    space, result = (along_space(op, weight.shape[2:], letter) for letter in "hy")
    source, of_weight = f"n {inward} {space}", f"{outward} i {kernel}"
    made = [term for term, wanted in zip((source, of_weight, outward), op["output_mask"], strict=True) if wanted]
    equation = f"n {outward} {result}, {source}, {of_weight} -> {', '.join(made)}"
    op.relate(equation, op["grad_output"], op["input"], weight, why=SLIDES, g=groups)


@rule(
    *aten(
        """
        max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward avg_pool3d_backward
        _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward upsample_nearest1d_backward
        upsample_nearest2d_backward upsample_nearest3d_backward upsample_linear1d_backward upsample_bilinear2d_backward
        upsample_bicubic2d_backward upsample_trilinear3d_backward
        """
    )
)
def spatial_backward(op: Op) -> None:
    """Channels and batch stay; the trailing spatial dims are resized."""
    spatial_of(op, [*op.inputs, *op.outputs], next(int(c) for c in op.target if c in "123"))


@rule("aten.slice_backward", "aten.select_backward")
def slice_backward(op: Op) -> None:
    """The gradient of a part, among zeros."""
    given, made = op["grad_output"], op.output
    along = op["dim"] % len(made.shape)
    whole = [d for d in range(len(made.shape)) if d != along]
    parts = whole if len(given.shape) == len(made.shape) else range(len(whole))
    for part, d in zip(parts, whole, strict=True):
        op.relations.align(given.dim(part), made.dim(d))
    op.fix(made, along, "a gradient is laid into a part of it")
    if len(given.shape) == len(made.shape):
        op.fix(given, along, "a gradient is laid into a part of something from it")
