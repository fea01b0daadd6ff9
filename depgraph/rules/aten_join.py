"""Operators that join several tensors into one, or part one into several."""

from __future__ import annotations

import numpy as np

from depgraph.graph import Value
from depgraph.operators import without_overload
from depgraph.rules.registry import Op, aten, rule


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(op: Op) -> None:
    _concatenate(op, op.inputs, op.get("dim") or 0)


_STACKS = {
    "aten.hstack": (1, 1),
    "aten.vstack": (2, 0),
    "aten.row_stack": (2, 0),
    "aten.dstack": (3, 2),
    "aten.column_stack": (2, 1),
}


@rule(*_STACKS)
def stack_along(op: Op) -> None:
    """Concatenated along the given dim; tensors of fewer dims get further ones of size 1 first."""
    rank, along = _STACKS[without_overload(op.target)]
    shorter = [len(value.shape) < max(rank, along + 1) for value in op.inputs]
    if not any(shorter):
        _concatenate(op, op.inputs, along)
    elif op.target.startswith("aten.hstack"):
        _concatenate(op, [value for value in op.inputs if value.shape], 0)
    else:
        op.fix_all("tensors of fewer dims are stacked")


def _concatenate(op: Op, values: list[Value], along: int) -> None:
    """Each tensor is a run of the output's dim `along`."""
    output, offset = op.output, 0
    for value in values:
        if value.shape == (0,):
            continue
        op.align_beside(value, output, along)
        size = value.shape[along]
        op.relations.align_at(value.dim(along), np.arange(size), output.dim(along), np.arange(offset, offset + size))
        offset += size


@rule("aten.stack")
def stack(op: Op) -> None:
    along = (op.get("dim") or 0) % len(op.output.shape)
    rest = [d for d in range(len(op.output.shape)) if d != along]
    for value in op.inputs:
        for old, new in enumerate(rest):
            op.relations.align(value.dim(old), op.output.dim(new))
    op.fix(op.output, along, "each of its indices is another tensor")


@rule("aten.meshgrid")
def meshgrid(op: Op) -> None:
    """Tensor k runs along dim k of every result (the first two the other way round with indexing "xy")."""
    order = list(range(len(op.outputs)))
    if op.get("indexing") == "xy":
        order[:2] = order[:2][::-1]
    for value, d in zip(op.inputs, order, strict=True):
        for output in op.outputs:
            if value.shape:
                op.relations.align(value.dim(0), output.dim(d))


@rule("aten.cartesian_prod")
def cartesian_product(op: Op) -> None:
    if len(op.inputs) == 1:
        op.align_elementwise([op.inputs[0], op.output])
        return
    op.relations.fold(op.output.dim(0), [value.dim(0) for value in op.inputs])
    op.fix(op.output, 1, "each of its indices is another tensor")


@rule("aten.slice_scatter", "aten.select_scatter")
def write_part(op: Op) -> None:
    """`src` replaces a part of dim `dim`; where that part lies is counted."""
    source, patch, along = op["self"], op["src"], op["dim"] % len(op["self"].shape)
    op.align_elementwise([source, op.output])
    op.fix(source, along, "a part of it is replaced")
    if len(patch.shape) == len(source.shape):
        op.align_beside(patch, source, along)
        op.fix(patch, along, "it replaces a part of another tensor")
        return
    rest = [d for d in range(len(source.shape)) if d != along]
    for old, new in enumerate(rest):
        op.relations.align(patch.dim(old), source.dim(new))


@rule(*aten("split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes"))
def split(op: Op) -> None:
    """The parts are runs of the source's dim, one after the other."""
    source, along = op.inputs[0], op.get("dim") or 0
    offset = 0
    for output in op.outputs:
        op.align_beside(source, output, along)
        size = output.shape[along]
        op.relations.align_at(output.dim(along), np.arange(size), source.dim(along), np.arange(offset, offset + size))
        offset += size


_ALONG = {"aten.hsplit": 1, "aten.vsplit": 0, "aten.dsplit": 2}


@rule(*_ALONG)
def split_along(op: Op) -> None:
    """As `split`, along the given dim (the only one where there is just one)."""
    rank = len(op.inputs[0].shape)
    op.arguments["dim"] = min(_ALONG[op.target.rsplit(".", 1)[0]], rank - 1)
    split(op)


@rule("aten.block_diag")
def block_diag(op: Op) -> None:
    """Matrices down the diagonal: each is a run of both dims."""
    if any(len(value.shape) != 2 for value in op.inputs):
        op.fix_all("tensors of fewer dims are stacked")
        return
    for d in (0, 1):
        offset = 0
        for value in op.inputs:
            size = value.shape[d]
            there = np.arange(offset, offset + size)
            op.relations.align_at(value.dim(d), np.arange(size), op.output.dim(d), there)
            offset += size


@rule("aten.pad_sequence")
def pad_sequence(op: Op) -> None:
    """Tensors [length, ...] of several lengths become one [n, length, ...] or [length, n, ...]."""
    for value in op.inputs:
        for d in range(1, len(value.shape)):
            op.relations.align(value.dim(d), op.output.dim(d + 1))
        op.fix(value, 0, "steps are counted along it")
    for d in (0, 1):
        op.fix(op.output, d, "sequences of several lengths are put side by side")


@rule("aten._pack_padded_sequence", "aten._pad_packed_sequence")
def packed(op: Op) -> None:
    """[n, steps, ...] or [steps, n, ...] <-> [what is left of both, ...]."""
    padded, flat = (op.inputs[0], op.output) if "_pack_" in op.target else (op.output, op.inputs[0])
    for d in range(1, len(flat.shape)):
        op.relations.align(flat.dim(d), padded.dim(d + 1))
    for value, count in ((padded, 2), (flat, 1), *((v, 1) for v in (*op.inputs[1:], *op.outputs[1:]))):
        for dim in value.dims[:count]:
            op.relations.fix(dim, op.reason("it packs sequences of several lengths"))
