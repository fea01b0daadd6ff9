"""Operators that lay one tensor out anew: views, transposes, slices, padding, repetition."""

from __future__ import annotations

import math

import numpy as np

from depgraph.graph import Step, Value
from depgraph.rules.registry import Op, aten, rule


@rule(
    *aten(
        """
        view reshape _unsafe_view flatten unflatten view_as reshape_as ravel _reshape_alias squeeze unsqueeze
        atleast_1d atleast_2d atleast_3d
        """
    )
)
def refold(op: Op) -> None:
    """The same elements in the same order, in other dims."""
    for source, output in zip(op.inputs, op.outputs, strict=False):
        if math.prod(source.shape) != math.prod(output.shape):
            op.fix_all("its bytes are read as another type")
        elif not math.prod(source.shape):
            _refold_empty(op, source, output)
        else:
            op.relations.refold(list(source.dims), list(output.dims))
    if op.target.endswith("_as.default"):
        op.align_elementwise([op.inputs[1], op.output])


def _refold_empty(op: Op, source: Value, output: Value) -> None:
    """Without elements, what comes before the dim of size 0 is laid out anew by itself, and so is what comes behind it."""
    (before, rest), (now_before, now_rest) = (_at_zero(value) for value in (source, output))
    sizes = op.relations.sizes
    pairs = ((before, now_before), (rest[:1], now_rest[:1]), (rest[1:], now_rest[1:]))
    if all(math.prod(sizes[d] for d in old) == math.prod(sizes[d] for d in new) for old, new in pairs):
        for old, new in pairs:
            op.relations.refold(old, new)
    else:
        op.fix_all("it has no elements, and is laid out anew")


def _at_zero(value: Value) -> tuple[list[int], list[int]]:
    """The dims before the first of size 0, and the others."""
    at = value.shape.index(0)
    return list(value.dims[:at]), list(value.dims[at:])


@rule("aten.view_as_real", "aten.view_as_complex")
def complex_pairs(op: Op) -> None:
    """A trailing pair (real, imaginary) comes or goes; what is seen as pairs in place lies an even number of places apart."""
    source, output = op.inputs[0], op.output
    pair = source if "complex" in op.target else output
    op.fix(pair, -1, "it holds real and imaginary parts")
    for a, b in zip(source.dims, output.dims, strict=False):
        op.relations.align(a, b)
    reason = op.reason("torch sees pairs as complex numbers only an even number of places apart")
    op.relations.steps.extend(Step(v.dim(-1), 2, reason) for v in op.rows if v.shape[-1] % 2 == 0)


def permute_dims(op: Op, order: list[int]) -> None:
    """Dim `order[d]` of the source is dim d of the result."""
    source = op.inputs[0]
    for new, old in enumerate(order):
        op.relations.align(source.dim(old), op.output.dim(new))


@rule("aten.permute")
def permute(op: Op) -> None:
    permute_dims(op, list(op["dims"]))


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims")
def transpose(op: Op) -> None:
    rank = len(op.output.shape)
    order = list(range(rank))
    a, b = (op.get("dim0", op.get("axis0")), op.get("dim1", op.get("axis1")))
    if rank:
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    permute_dims(op, order)


@rule("aten.t", "aten.numpy_T", "aten.matrix_H")
def transpose_all(op: Op) -> None:
    permute_dims(op, list(range(len(op.output.shape)))[::-1])


@rule("aten.mT", "aten.mH", "aten.adjoint")
def transpose_matrix(op: Op) -> None:
    rank = len(op.output.shape)
    permute_dims(op, [*range(rank - 2), rank - 1, rank - 2])


@rule("aten.movedim", "aten.moveaxis")
def movedim(op: Op) -> None:
    rank = len(op.output.shape)
    source, destination = ([int(d) % rank for d in np.atleast_1d(op[name])] for name in ("source", "destination"))
    rest = iter([d for d in range(rank) if d not in source])
    permute_dims(op, [source[destination.index(d)] if d in destination else next(rest) for d in range(rank)])


@rule("aten.expand", "aten.broadcast_to", "aten.expand_as")
def expand(op: Op) -> None:
    """What is expanded from size 1 is the same at every index."""
    op.align_elementwise([*op.inputs, op.output])
    source, relations = op.inputs[0], op.relations
    for d in range(1, len(op.output.shape) + 1):
        if d > len(source.shape) or source.shape[-d] == 1 or source.dim(-d) in relations.constant:
            relations.constant.add(op.output.dim(-d))


@rule("aten.select", "aten.unbind")
def select(op: Op) -> None:
    """Dim `dim` goes: single indices of it are picked."""
    source, dim = op.inputs[0], op["dim"] % len(op.inputs[0].shape)
    _align_rest(op, source, dim)
    op.fix(source, dim, "single indices of it are picked")


def _align_rest(op: Op, source: Value, dim: int) -> None:
    rest = [d for d in range(len(source.shape)) if d != dim]
    for output in op.outputs:
        for new, old in enumerate(rest):
            op.relations.align(source.dim(old), output.dim(new))


@rule("aten.slice", "aten.narrow")
def slice_(op: Op) -> None:
    source, along = op.inputs[0], op.get("dim") or 0
    op.align_beside(source, op.output, along)
    start, length = op.get("start"), op.get("length")
    if isinstance(start, Value):
        op.fix(source, along, "where the slice begins is known at run time only")
        op.fix(op.output, along, "where the slice begins is known at run time only")
        return
    size = source.shape[along]
    if length is not None:
        start %= size or 1
    stop = op.get("end") if length is None else start + length
    picked = np.arange(size)[slice(start, stop, op.get("step") or 1)]
    op.relations.align_at(op.output.dim(along), np.arange(len(picked)), source.dim(along), picked)


@rule(
    *aten(
        """
        constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d
        """
    )
)
def pad(op: Op) -> None:
    """Amounts come in pairs from the last dim; a padded dim holds the old one at an offset, or it is fixed."""
    source = op.inputs[0]
    amounts = op.get("pad", op.get("padding"))
    constant = op.target.startswith("aten.constant_pad") or op.get("mode", "") == "constant"
    for d in range(1, len(source.shape) + 1):
        before, after = amounts[2 * d - 2 : 2 * d] if 2 * d <= len(amounts) else (0, 0)
        if before == after == 0:
            op.relations.align(source.dim(-d), op.output.dim(-d))
        elif constant and before >= 0 and after >= 0:
            size = source.shape[-d]
            op.relations.align_at(source.dim(-d), np.arange(size), op.output.dim(-d), np.arange(before, before + size))
        else:
            op.fix(source, -d, "it is padded from within")
            op.fix(op.output, -d, "it is padded from within")


@rule("aten.repeat", "aten.tile")
def repeat(op: Op) -> None:
    """Each dim is laid out `times` after itself: [times, size] in one."""
    source, output = op.inputs[0], op.output
    for d in range(1, len(source.shape) + 1):
        if output.shape[-d]:
            times = op.relations.new_dim(output.shape[-d] // source.shape[-d])
            op.relations.fold(output.dim(-d), [times, source.dim(-d)])


@rule("aten.repeat_interleave")
def repeat_interleave(op: Op) -> None:
    """Each index stands `repeats` times in a row, [size, repeats] in one; without `dim`, of the flattened tensor."""
    source, output, along = op["self"], op.output, op.get("dim")
    if not isinstance(op.get("repeats"), int):
        _repeat_each(op, source, along)
        return
    repeats = op.relations.new_dim(op["repeats"])
    if along is None:
        op.relations.fix(repeats, op.reason("the flattened tensor is repeated"))
        op.relations.fold(output.dim(0), [*source.dims, repeats])
        return
    op.align_beside(source, output, along)
    op.relations.fold(output.dim(along), [source.dim(along), repeats])


def _repeat_each(op: Op, source: Value, along: int | None) -> None:
    """Each index as often as a tensor says."""
    if along is None:
        op.fix_all("how often an index is repeated is known at run time only")
        return
    op.align_beside(source, op.output, along)
    for value, d in ((source, along), (op.output, along), (op["repeats"], 0)):
        if value.shape:
            op.fix(value, d, "how often an index is repeated is known at run time only")


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(op: Op) -> None:
    """[n, g·c, ...] -> [n, c·g, ...]."""
    source, output = op.inputs[0], op.output
    g, c = op.relations.new_dim(op["groups"]), op.relations.new_dim(source.shape[1] // op["groups"])
    op.relations.fold(source.dim(1), [g, c])
    op.relations.fold(output.dim(1), [c, g])
    op.align_beside(source, output, 1)


@rule("aten.unfold")
def unfold(op: Op) -> None:
    """Windows along `dimension` become a further, last dim."""
    source = op.inputs[0]
    if not source.shape:
        return
    along = op["dimension"] % len(source.shape)
    op.align_beside(source, op.output, along)
    for value, d in ((source, along), (op.output, along), (op.output, -1)):
        op.fix(value, d, "windows slide along it")


@rule("aten.rot90")
def rotate(op: Op) -> None:
    """Two dims change places and directions."""
    source, turned = op.inputs[0], {d % len(op.output.shape) for d in op["dims"]}
    for d in range(len(source.shape)):
        if d not in turned:
            op.relations.align(source.dim(d), op.output.dim(d))
            continue
        op.fix(source, d, "it is rotated")
        op.fix(op.output, d, "it is rotated")
