"""Operators that ONNX has in a form of its own: products with transposes, slices, pads, lookups, quantisation."""

from __future__ import annotations

import math

import numpy as np

from depgraph.graph import Value
from depgraph.rules.aten_index import LOOKED_UP
from depgraph.rules.onnx_shared import as_aten, fused, operand, setting, windows
from depgraph.rules.registry import Op, rule

_AT_RUN_TIME = "what is taken of it is known at run time only"


@rule("onnx.Gemm", "microsoft.FusedGemm")
def general_product(op: Op) -> None:
    """A [m, k] or [k, m], B [k, n] or [n, k], C [m, n] or what broadcasts to that."""
    left, right, added = (operand(op, k) for k in range(3))
    a = "k m" if op.get("transA") else "m k"
    b = "n k" if op.get("transB") else "k n"
    op.relate(f"{a}, {b} -> m n", left, right, work="m k n")
    if added is not None:
        op.align_elementwise([added, op.output])


@rule(*fused("FusedMatMul TransposeMatMul"))
def transposed_product(op: Op) -> None:
    left, right = operand(op, 0), operand(op, 1)
    assert left is not None and right is not None
    if op.get("transBatchA") or op.get("transBatchB") or min(len(left.shape), len(right.shape)) < 2:
        op.fix_all("the operator moves its batch dims")
        return
    a = "... k m" if op.get("transA") else "... m k"
    b = "... n k" if op.get("transB") else "... k n"
    op.relate(f"{a}, {b} -> ... m n", left, right, work="... m k n")


@rule(*fused("FusedConv"))
def convolution(op: Op) -> None:
    """A convolution, with something added to what it makes and a function of that."""
    source, weight, bias, added = (operand(op, k) for k in range(4))
    as_aten(op, "aten.convolution", input=source, weight=weight, bias=bias, **windows(op))
    if added is not None:
        op.align_elementwise([added, op.output])


@rule("onnx.ConvInteger", "onnx.QLinearConv")
def quantised_convolution(op: Op) -> None:
    """Scales and zero points are numbers, or one for each output channel."""
    linear = op.target.endswith("QLinearConv")
    source, weight, bias = operand(op, 0), operand(op, 3 if linear else 1), operand(op, 8) if linear else None
    as_aten(op, "aten.convolution", input=source, weight=weight, bias=bias, **windows(op))
    for position in (4, 5) if linear else (3,):
        value = operand(op, position)
        if value is not None and value.shape and value.shape[0] > 1:
            op.relations.align(value.dim(0), op.output.dim(1))


@rule("onnx.MatMulInteger", "onnx.QLinearMatMul")
def quantised_product(op: Op) -> None:
    """As `quantised_convolution`, for the columns of the second factor."""
    linear = op.target.endswith("QLinearMatMul")
    right = operand(op, 3 if linear else 1)
    as_aten(op, "aten.matmul", self=operand(op, 0), other=right)
    for position in (4, 5) if linear else (3,):
        value = operand(op, position)
        if value is not None and value.shape and value.shape[-1] > 1:
            op.relations.align(value.dim(-1), op.output.dim(-1))


@rule("onnx.QuantizeLinear", "onnx.DequantizeLinear", "microsoft.QuantizeLinear", "microsoft.DequantizeLinear")
def quantised(op: Op) -> None:
    """Numbers stay in their places; a scale is one number, one for each index of `axis`, or one for each block of that."""
    source = operand(op, 0)
    assert source is not None
    op.align_elementwise([source, op.output])
    axis = op.get("axis", 1)
    for value in (operand(op, 1), operand(op, 2)):
        if value is None or math.prod(value.shape) == 1:
            continue
        if len(value.shape) == 1:
            op.relations.align(value.dim(0), source.dim(axis))
            continue
        op.align_beside(value, source, axis)
        op.relations.fold(source.dim(axis), [value.dim(axis), op.relations.new_dim(int(op["block_size"]))])


@rule("onnx.DynamicQuantizeLinear")
def quantised_by_range(op: Op) -> None:
    op.align_elementwise([op.inputs[0], op.output])
    for dim in op.output.dims:
        op.relations.mix(dim, "its scale is that of the extremes along it")


@rule("onnx.Slice")
def slice_(op: Op) -> None:
    """Bounds may be numbers of the file, or computed."""
    source = operand(op, 0)
    assert source is not None
    parts = slices(op, len(source.shape))
    if parts is None:
        for d in range(len(source.shape)):
            if source.shape[d] != op.output.shape[d]:
                op.fix(source, d, _AT_RUN_TIME)
                op.fix(op.output, d, _AT_RUN_TIME)
            else:
                op.relations.align(source.dim(d), op.output.dim(d))
        return
    for d, size in enumerate(source.shape):
        picked = np.arange(size)[parts.get(d, slice(None))]
        op.relations.align_at(op.output.dim(d), np.arange(len(picked)), source.dim(d), picked)


def slices(op: Op, rank: int) -> dict[int, slice] | None:
    """What is taken of each sliced dim; None where that is computed from the data."""
    starts, ends = setting(op, "starts", 1), setting(op, "ends", 2)
    if starts is None or ends is None:
        return None
    axes, steps = setting(op, "axes", 3, list(range(len(starts)))), setting(op, "steps", 4, [1] * len(starts))
    if axes is None or steps is None:
        return None
    return {int(a) % rank: cut(s, e, t) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def cut(start: int, end: int, step: int) -> slice:
    """A slice as ONNX means it: backwards, an end far below zero is before the first index."""
    return slice(int(start), None if step < 0 and end < -(1 << 31) else int(end), int(step))


@rule("onnx.Pad")
def pad(op: Op) -> None:
    """Amounts before each dim, then after each."""
    source = operand(op, 0)
    assert source is not None
    rank, amounts = len(source.shape), setting(op, "pads", 1)
    axes = setting(op, "axes", 3, list(range(rank)))
    if amounts is None or axes is None:
        op.fix_all("how far it is padded is known at run time only")
        return
    pairs = [(0, 0)] * rank
    for k, d in enumerate(axes):
        pairs[int(d) % rank] = (int(amounts[k]), int(amounts[k + len(axes)]))
    flat = [amount for pair in reversed(pairs) for amount in pair]
    target = "aten.constant_pad_nd" if op.get("mode", "constant") == "constant" else "aten.pad"
    as_aten(op, target, self=source, pad=flat, mode=op.get("mode", "constant"))


@rule("onnx.Resize", "onnx.Upsample", "onnx.CenterCropPad", "onnx.Col2Im", "onnx.AffineGrid")
@rule("onnx.RoiAlign", "onnx.MaxRoiPool")
def resize(op: Op) -> None:
    """Batch and channels stay where the operator leaves their sizes alone; all else is space."""
    source = op.inputs[0]
    lead = 1 if op.target.endswith(("RoiAlign", "MaxRoiPool")) else 0
    for value in (*op.inputs, *op.outputs):
        for d in range(len(value.shape)):
            kept = value in (source, op.output) and lead <= d < 2 and source.shape[d] == op.output.shape[d]
            if kept and len(source.shape) == len(op.output.shape):
                op.relations.align(value.dim(d), op.output.dim(d))
            else:
                op.fix(value, d, "it is a spatial dimension")


@rule("onnx.MaxUnpool")
def unpool(op: Op) -> None:
    """The indices count through all channels and samples."""
    op.fix_all("it is told by numbers that count all places of a tensor where they go")


@rule("onnx.DepthToSpace")
def depth_to_space(op: Op) -> None:
    """[n, c·b·b, h, w] -> [n, c, h·b, w·b], the blocks before the channels unless the mode is CRD."""
    _blocks(op, deep=op.inputs[0], wide=op.output, first=op.get("mode", "DCR") == "DCR")


@rule("onnx.SpaceToDepth")
def space_to_depth(op: Op) -> None:
    """[n, c, h·b, w·b] -> [n, b·b·c, h, w], the blocks before the channels unless the mode is CRD."""
    _blocks(op, deep=op.output, wide=op.inputs[0], first=op.get("mode", "DCR") == "DCR")


def _blocks(op: Op, deep: Value, wide: Value, *, first: bool) -> None:
    relations, size = op.relations, int(op["blocksize"])
    block = relations.new_dim(size * size)
    relations.fold(deep.dim(1), [block, wide.dim(1)] if first else [wide.dim(1), block])
    relations.align(deep.dim(0), wide.dim(0))
    for dim in (block, *deep.dims[2:], *wide.dims[2:]):
        relations.fix(dim, op.reason("channels become space and the other way round"))


@rule("onnx.Gather")
def gather(op: Op) -> None:
    """Rows, or single indices, of one dim; of numbers in the file it is known which, and they follow a cut."""
    source, index = operand(op, 0), operand(op, 1)
    assert source is not None
    axis = op.get("axis", 0) % len(source.shape)
    picks = op["known"].get(1)
    rank = len(op.output.shape) - len(source.shape) + 1
    for d in range(len(source.shape)):
        if d != axis:
            op.relations.align(source.dim(d), op.output.dim(d if d < axis else d + rank - 1))
    if picks is not None and picks.ndim == 1 and 1 in op["constant"]:
        at = picks.astype(np.int64) % source.shape[axis]
        op.relations.align_at(op.output.dim(axis), np.arange(len(at)), source.dim(axis), at)
        if index is not None:
            op.relations.align(index.dim(0), op.output.dim(axis))
        return
    if picks is not None and picks.ndim == 0:
        op.fix(source, axis, "single indices of it are picked")
        return
    op.point(source, axis, index, LOOKED_UP if axis == 0 else "")
    for d in range(rank if index is not None else 0):
        op.relations.align(index.dim(d), op.output.dim(axis + d))  # type: ignore[union-attr]


@rule("onnx.GatherND")
def gather_nd(op: Op) -> None:
    """The first dims of the source are pointed into, the others stay."""
    source, index = operand(op, 0), operand(op, 1)
    assert source is not None and index is not None
    batch = op.get("batch_dims", 0)
    covered = batch + index.shape[-1]
    for d in range(batch, covered):
        op.fix(source, d, "an index tensor points into it")
    for dim in index.dims:
        op.relations.fix(dim, op.reason("it says what is picked"))
    for d in range(len(index.shape) - 1):
        op.relations.align(index.dim(d), op.output.dim(d))
    for k, d in enumerate(range(covered, len(source.shape))):
        op.relations.align(source.dim(d), op.output.dim(len(index.shape) - 1 + k))


@rule("onnx.ScatterND")
def scatter_nd(op: Op) -> None:
    """The first dims of the data are pointed into, the others stay."""
    source, index, written = (operand(op, k) for k in range(3))
    assert source is not None and written is not None
    op.align_elementwise([source, op.output])
    known = op["known"].get(1)
    width = index.shape[-1] if index is not None else known.shape[-1]
    rows = (len(index.shape) if index is not None else known.ndim) - 1
    for d in range(width):
        op.fix(source, d, "values are written where an index tensor points")
    for dim in (*(index.dims if index is not None else ()), *written.dims[:rows]):
        op.relations.fix(dim, op.reason("it says what is written where"))
    for k, d in enumerate(range(width, len(source.shape))):
        op.relations.align(written.dim(rows + k), source.dim(d))


@rule("onnx.OneHot")
def one_hot(op: Op) -> None:
    """A further dim counts the classes."""
    chosen, axis = operand(op, 0), op.get("axis", -1) % len(op.output.shape)
    op.fix(op.output, axis, "it counts the classes")
    rest = [d for d in range(len(op.output.shape)) if d != axis]
    for d, dim in enumerate(chosen.dims if chosen is not None else ()):
        op.relations.align(dim, op.output.dim(rest[d]))


@rule("onnx.LRN", "onnx.ReverseSequence")
def along_a_dim(op: Op) -> None:
    """Neighbours along one dim are added up, or it is turned round."""
    source = op.inputs[0]
    op.align_elementwise([source, op.output])
    if op.target == "onnx.LRN":
        op.fix(source, 1, "neighbouring channels are added up")
        return
    for d in (0, 1):
        op.fix(source, d, "the order of its indices matters")
    for dim in (dim for value in op.inputs[1:] for dim in value.dims):
        op.relations.fix(dim, op.reason("it says how long sequences are"))


@rule("onnx.MeanVarianceNormalization")
def whitened(op: Op) -> None:
    op.align_elementwise([op.inputs[0], op.output])
    for d in op.get("axes") or (0, 2, 3):
        op.relations.mix(op.output.dim(d), "its mean and variance are taken over it")


@rule(*fused("SkipLayerNormalization SkipSimplifiedLayerNormalization"))
def skip_norm(op: Op) -> None:
    """x + skip + bias, normalised over the last dim."""
    simple = "Simplified" in op.target
    source, skip, gamma = operand(op, 0), operand(op, 1), operand(op, 2)
    bias = operand(op, 3 if simple else 4)
    assert source is not None
    others = [skip, gamma, bias, None if simple else operand(op, 3)]
    for value in (*(v for v in others if v is not None), *op.outputs):
        op.align_elementwise([source, value])
    op.relations.mix(source.dim(-1), "layer norm averages over it")


@rule(*fused("EmbedLayerNormalization"))
def embedded_norm(op: Op) -> None:
    """Rows of up to three tables are added and normalised."""
    tables = [operand(op, k) for k in (2, 3, 4)]
    width = op.output.dim(-1)
    for table in tables:
        if table is not None:
            op.fix(table, 0, LOOKED_UP)
            op.relations.align(table.dim(1), width)
    for value in (operand(op, 5), operand(op, 6)):
        if value is not None:
            op.relations.align(value.dim(0), width)
    for value in op.outputs[2:]:
        op.align_elementwise([op.output, value])
    op.relations.mix(width, "layer norm averages over it")
