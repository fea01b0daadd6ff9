"""Operators that look things up: embeddings, gathers, masks."""

from __future__ import annotations

import numpy as np

from depgraph.graph import Value
from depgraph.rules.registry import Op, aten, rule

LOOKED_UP = "its rows are looked up by number"


@rule("aten.embedding")
def embedding(op: Op) -> None:
    op.relate("v! c, ... -> ... c", why=LOOKED_UP)


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(op: Op) -> None:
    """Bags of rows of the table are summed, averaged or maximised; what says which rows is left alone."""
    op.relate("v! c -> n! c", op["weight"], why=LOOKED_UP)
    for value in [*op.inputs[1:], *op.outputs[1:]]:
        for dim in value.dims:
            op.relations.fix(dim, op.reason("it says which rows make a bag"))


@rule("aten.index_select")
def index_select(op: Op) -> None:
    """The values of the index would have to change with the source, so it is fixed even where they are known."""
    source, index, along = op["self"], op["index"], op["dim"]
    if not source.shape:
        return
    op.align_beside(source, op.output, along)
    op.fix(source, along, "an index tensor points into it")
    if index.shape:
        op.relations.align(index.dim(0), op.output.dim(along))


@rule("aten.index", "aten._unsafe_index")
def index(op: Op) -> None:
    """x[i, j, ...]: indexed dims are fixed, the indices' own dims take their place, the others stay."""
    source, indices = op["self"], list(op["indices"])
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(_is_mask(indices[d]) for d in used):
        _mask_index(op, source, indices, used)
        return
    for d in used:
        op.fix(source, d, "an index tensor points into it")
    rank = max((len(indices[d].shape) for d in used), default=0)
    together = used == list(range(used[0], used[-1] + 1)) if used else True
    begin = used[0] if used and together else 0
    rest = [d for d in range(len(source.shape)) if d not in used]
    places = [p for p in range(len(op.output.shape)) if not begin <= p < begin + rank]
    for d, place in zip(rest, places, strict=True):
        op.relations.align(source.dim(d), op.output.dim(place))
    for d in used:
        for k in range(1, len(indices[d].shape) + 1):
            op.relations.align(indices[d].dim(-k), op.output.dim(begin + rank - k))


def _is_mask(value: Value) -> bool:
    return value.itemsize == 1


def _mask_index(op: Op, source: Value, indices: list[Value | None], used: list[int]) -> None:
    """A single mask takes the place of the dims it covers by one; anything more is left alone."""
    mask = indices[used[0]]
    if len(used) > 1 or mask is None:
        op.fix_all("a mask picks from it")
        return
    begin, covered = used[0], len(mask.shape)
    for dim in (*source.dims[begin : begin + covered], *mask.dims, op.output.dim(begin)):
        op.relations.fix(dim, op.reason("a mask picks from it"))
    rest = [d for d in range(len(source.shape)) if not begin <= d < begin + covered]
    for d, place in zip(rest, (p for p in range(len(op.output.shape)) if p != begin), strict=True):
        op.relations.align(source.dim(d), op.output.dim(place))


@rule("aten.gather", "aten.take_along_dim")
def gather(op: Op) -> None:
    """Dims beside `dim` are read at the same index, as far as the index tensor goes."""
    source, picks = op["self"], op.get("index", op.get("indices"))
    if op["dim"] is None:
        op.fix_all("an index tensor points into it")
        return
    if not source.shape:
        return
    along = op["dim"] % len(source.shape)
    op.align_elementwise([picks, op.output])
    for d, size in enumerate(op.output.shape):
        if d == along:
            op.fix(source, d, "an index tensor points into it")
        elif op.target.startswith("aten.take_along_dim"):
            op.relations.align(source.dim(d), op.output.dim(d))
        else:
            op.relations.align_at(source.dim(d), np.arange(size), op.output.dim(d), np.arange(size))


@rule("aten.isin", "aten.bucketize")
def membership(op: Op) -> None:
    """Elements are looked up one by one in a tensor that stays whole."""
    elements, known = (op.get("elements", op.get("self")), op.get("test_elements", op.get("boundaries")))
    if isinstance(elements, Value):
        op.align_elementwise([elements, op.output])
    if isinstance(known, Value):
        for dim in known.dims:
            op.relations.fix(dim, op.reason("values are looked up in it"))


@rule("aten.index_add", "aten.index_copy", "aten.index_fill", "aten.index_reduce")
def write_rows(op: Op) -> None:
    """Rows of `source` go to positions along `dim`; the other dims keep their places."""
    target, rows, along = op["self"], op.get("source", op.get("tensor")), op["dim"]
    op.align_elementwise([target, op.output])
    if not target.shape:
        return
    op.fix(target, along, "an index tensor points into it")
    if rows is not None and len(rows.shape) == len(target.shape):
        op.align_beside(rows, target, along)
        op.fix(rows, along, "its rows are put where an index tensor points")
    if op["index"].shape:
        op.fix(op["index"], 0, "it says where rows are put")


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(op: Op) -> None:
    """Elements of `src` go to positions along `dim`; on other dims they keep their places, as far as the index goes."""
    target, along = op["self"], op["dim"]
    op.align_elementwise([target, op.output])
    for value in (op["index"], op.get("src")):
        for d in range(len(value.shape) if isinstance(value, Value) else 0):
            if d == along % len(target.shape):
                op.fix(target, d, "an index tensor points into it")
                op.fix(value, d, "it says what goes where")
            else:
                known = np.arange(op["index"].shape[d])
                op.relations.align_at(value.dim(d), known, target.dim(d), known)


_WRITES = aten("index_put _unsafe_index_put masked_scatter put")
_COUNTS = aten("""
    one_hot bincount nonzero nonzero_numpy argwhere histc unique_consecutive unique_dim _unique2 searchsorted take
    masked_select multinomial repeat_interleave.Tensor where.default
""")


@rule(*_WRITES)
def written(op: Op) -> None:
    op.fix_all("values are written at positions known at run time only")


@rule(*_COUNTS)
def counted(op: Op) -> None:
    op.fix_all("what comes out depends on the data")
