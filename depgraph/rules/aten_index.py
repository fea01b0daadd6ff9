"""Operators that look things up: embeddings, gathers, masks."""

from __future__ import annotations

import numpy as np

from depgraph.graph import Value
from depgraph.rules.registry import Op, aten, rule

LOOKED_UP = "its rows are looked up by number"


@rule("aten.embedding")
def embedding(op: Op) -> None:
    op.relate("v c, ... -> ... c")
    op.point(op["weight"], 0, op["indices"], LOOKED_UP)


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(op: Op) -> None:
    """Bags of rows of the table are summed, averaged or maximised; what says which rows is left alone."""
    op.relate("v! c -> n! c", op["weight"], why=LOOKED_UP)
    for value in [*op.inputs[1:], *op.outputs[1:]]:
        for dim in value.dims:
            op.relations.fix(dim, op.reason("it says which rows make a bag"))


@rule("aten.embedding_renorm_")
def embedding_renorm(op: Op) -> None:
    """Rows of the table are scaled by their norms."""
    op.relate("v! c~ -> v c", op["self"])
    for dim in op["indices"].dims:
        op.relations.fix(dim, op.reason("it says which rows are scaled"))


@rule("aten.index_select")
def index_select(op: Op) -> None:
    """Constant values of the index would have to change with the source, so it is fixed even where they are known."""
    source, index, along = op["self"], op["index"], op["dim"]
    if not source.shape:
        return
    op.align_beside(source, op.output, along)
    op.point(source, along, index)
    if index.shape:
        op.relations.align(index.dim(0), op.output.dim(along))


@rule("aten.index", "aten._unsafe_index")
def index(op: Op) -> None:
    """x[i, j, ...]: indexed dims are pointed into, the indices' own dims take their place, the others stay."""
    source, indices = op["self"], list(op["indices"])
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(_is_mask(indices[d]) for d in used):
        _mask_index(op, source, indices, used)
        return
    for d in used:
        op.point(source, d, indices[d])
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
            op.point(source, d, picks)
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
    op.point(target, along, op["index"])
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
                op.point(target, d, op["index"])
                op.fix(value, d, "it says what goes where")
            else:
                known = np.arange(op["index"].shape[d])
                op.relations.align_at(value.dim(d), known, target.dim(d), known)


@rule("aten.index_put", "aten._unsafe_index_put")
def index_put(op: Op) -> None:
    """x[i, j, ...] = v: indexed dims and the indices' own are fixed, the others stay; v broadcasts to what x[i, j, ...] is."""
    target, indices, written = op["self"], list(op["indices"]), op["values"]
    op.align_elementwise([target, op.output])
    ends, used = _covered(indices)
    for value in (i for i in indices if i is not None):
        for dim in value.dims:
            op.relations.fix(dim, op.reason("it says what is written where"))
    for d in (d for begin, end in ends for d in range(begin, end)):
        op.fix(target, d, "values are written where an index tensor points")
    rank = max((1 if _is_mask(i) else len(i.shape) for i in indices if i is not None), default=0)
    inside = {d for begin, end in ends for d in range(begin, end)}
    rest = [d for d in range(len(target.shape)) if d not in inside]
    together = used == list(range(used[0], used[-1] + 1))
    front = sum(d < ends[0][0] for d in rest) if together else 0
    picked: list[int | None] = [*rest[:front], *[None] * rank, *rest[front:]]
    for k, place in enumerate(reversed(picked[-len(written.shape) :] if written.shape else []), 1):
        if place is None:
            op.fix(written, -k, "it is written where an index tensor points")
        else:
            op.relations.align(written.dim(-k), target.dim(place))


def _covered(indices: list[Value | None]) -> tuple[list[tuple[int, int]], list[int]]:
    """The runs of dims that each index covers (a mask may cover several), and the positions of the indices."""
    ends, used, at = [], [], 0
    for position, value in enumerate(indices):
        width = len(value.shape) if value is not None and _is_mask(value) else 1
        if value is not None:
            ends.append((at, at + width))
            used.append(position)
        at += width
    return ends, used


@rule("aten.masked_scatter")
def masked_scatter(op: Op) -> None:
    """The source's elements go where the mask is true, in order: whole rows where the mask is the same along the last dims."""
    target, mask, source = op["self"], op["mask"], op["source"]
    op.align_elementwise([mask, target, op.output])
    rows = 0
    while rows < min(len(target.shape), len(source.shape)) and _alike_along(op, mask, rows + 1):
        if source.shape[-rows - 1] != target.shape[-rows - 1]:
            break
        rows += 1
        op.relations.align(source.dim(-rows), target.dim(-rows))
    for value in (target, source, mask):
        for d in range(rows + 1, len(value.shape) + 1):
            op.fix(value, -d, "which elements are written is known at run time only")


def _alike_along(op: Op, mask: Value, d: int) -> bool:
    """Is the mask the same at every index of its dim `-d`?"""
    return d > len(mask.shape) or mask.shape[-d] == 1 or mask.dim(-d) in op.relations.constant


@rule("aten.put")
def put(op: Op) -> None:
    op.fix_all("values are written at positions known at run time only")


@rule("aten.take")
def take(op: Op) -> None:
    """Elements of the flattened source, one for each index."""
    op.align_elementwise([op["index"], op.output])
    for dim in op["self"].dims:
        op.relations.fix(dim, op.reason("an index tensor points into it"))


def _classes(op: Op) -> None:
    """A further, last dim counts the classes."""
    for a, b in zip(op["self"].dims, op.output.dims, strict=False):
        op.relations.align(a, b)
    op.fix(op.output, -1, "it counts the classes")


@rule("aten.searchsorted")
def searchsorted(op: Op) -> None:
    """Values are looked up one by one, each row of them in a row of its own or all in the only one."""
    known, values = op["sorted_sequence"], op.get("self")
    op.fix(known, -1, "values are looked up in it")
    sorter = op.get("sorter")
    if isinstance(sorter, Value):
        op.align_elementwise([sorter, known])
    if not isinstance(values, Value):
        return
    op.align_elementwise([values, op.output])
    for d in range(2, len(known.shape) + 1):
        op.relations.align(known.dim(-d), values.dim(-d))


_COUNTS = aten("""
    bincount nonzero nonzero_numpy argwhere unique_consecutive unique_dim _unique2
    masked_select multinomial repeat_interleave.Tensor where.default
""")


@rule(*_COUNTS)
def counted(op: Op) -> None:
    op.fix_all("what comes out depends on the data")


@rule("aten.one_hot", "aten.histc")
def counted_by_index(op: Op) -> None:
    """Each index that was chosen among a dim has a place of its own in the last dim of what comes out."""
    chosen, places = op["self"], op.output.shape[-1]
    size = 0 if chosen.domain is None else op.relations.sizes[chosen.domain]
    whole = op.target.startswith("aten.one_hot") or (op["min"], op["max"]) == (0, places - 1)
    if not size or places < size or not whole:
        (_classes if op.target.startswith("aten.one_hot") else counted)(op)
        return
    for d, dim in enumerate(chosen.dims):
        if op.target.startswith("aten.one_hot"):
            op.relations.align(dim, op.output.dim(d))
        else:
            op.fix(chosen, d, "what comes out counts its elements")
    op.relations.align_at(chosen.domain, np.arange(size), op.output.dim(-1), np.arange(size))
    op.relations.fix(op.output.dim(-1), op.reason("no index has this place"), np.arange(size, places))
    op.followed.add(chosen.name)
