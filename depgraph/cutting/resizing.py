"""How sizes, splits, slices, repeats and groups in the arguments of operators follow a cut: rows of `rewriting`'s table."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from depgraph.capture.proxies import size_hint
from depgraph.cutting.rewriting import Share, Sized, rewrites
from depgraph.operators import by_name

_aten = torch.ops.aten


@rewrites("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "zeros", "ones", "full", "empty", "rand", "randn",
           "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "_reshape_alias", "view_copy")  # fmt: skip
def _whole_shape(op: Sized) -> None:
    name = "size" if "size" in op.arguments else "shape"
    op.set_sizes(name, op.outputs[0])


@rewrites("unflatten")
def _unflatten(op: Sized) -> None:
    assert op.source is not None
    first = op.arguments["dim"] % len(op.source.shape)
    old = list(op.arguments["sizes"])
    made = op.outputs[0]
    new = [s if s == -1 or not op.narrowed(made, first + k) else op.size(s, made, first + k) for k, s in enumerate(old)]
    if new != old:
        op.changes["sizes"] = new


@rewrites("slice_backward", "select_backward", "upsample_nearest1d_backward", "upsample_nearest2d_backward",
           "upsample_nearest3d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward",
           "upsample_bicubic2d_backward", "upsample_trilinear3d_backward")  # fmt: skip
def _sizes_before(op: Sized) -> None:
    op.set_sizes("input_sizes" if "input_sizes" in op.arguments else "input_size", op.outputs[0])


@rewrites("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "native_layer_norm_backward")
def _normalized_shape(op: Sized) -> None:
    op.set_sizes("normalized_shape", op.outputs[0])


@rewrites("split_with_sizes", "unsafe_split_with_sizes", "split.sizes")
def _split_sizes(op: Sized) -> None:
    along = op.arguments["dim"]
    name = "split_size" if "split_size" in op.arguments else "split_sizes"
    old = list(op.arguments[name])
    new = [op.size(s, v, along) if op.narrowed(v, along) else s for s, v in zip(old, op.outputs, strict=True)]
    if new != old:
        op.changes[name] = new


@rewrites("tensor_split")
def _split_at(op: Sized) -> None:
    along = op.arguments["dim"]
    sizes = [op.shape(v)[along] for v in op.outputs]
    if sizes == [v.shape[along] for v in op.outputs]:
        return
    if isinstance(op.arguments.get("indices"), list):
        op.changes["indices"] = np.cumsum(sizes)[:-1].tolist()
    elif sizes != [len(part) for part in np.array_split(np.arange(sum(sizes)), len(sizes))]:
        op.target = _aten.split_with_sizes.default
        op.changes = {"self": op.arguments["self"], "split_sizes": sizes, "dim": along}


@rewrites("hsplit", "vsplit", "dsplit")
def _split_in_runs(op: Sized) -> None:
    assert op.source is not None
    along = {"h": 1, "v": 0, "d": 2}[str(op.node.target).split(".")[1][0]]
    along = min(along, len(op.source.shape) - 1)
    sizes = [op.shape(v)[along] for v in op.outputs]
    if sizes == [v.shape[along] for v in op.outputs]:
        return
    if isinstance(op.arguments.get("indices"), list):
        op.changes["indices"] = np.cumsum(sizes)[:-1].tolist()
    elif len(set(sizes)) > 1:
        op.target = _aten.split_with_sizes.default
        op.changes = {"self": op.arguments["self"], "split_sizes": sizes, "dim": along}


@rewrites("narrow")
def _narrow(op: Sized) -> None:
    assert op.source is not None
    along = op.arguments["dim"] % len(op.source.shape)
    if not op.narrowed(op.source, along):
        return
    start = op.arguments["start"] % op.source.shape[along]
    new_start = int((op.indices(op.source, along) < start).sum())
    length = op.shape(op.outputs[0])[along]
    if new_start != op.arguments["start"]:
        op.changes["start"] = new_start
    if length != op.arguments["length"]:
        op.changes["length"] = length


@rewrites("split.Tensor", "chunk", "unsafe_split", "unsafe_chunk")
def _split_evenly(op: Sized) -> None:
    assert op.source is not None
    along = op.arguments["dim"]
    sizes = [op.shape(v)[along] for v in op.outputs]
    if sizes == [v.shape[along] for v in op.outputs]:
        return
    if "split_size" in op.arguments:
        op.changes["split_size"] = sizes[0]
        if not even(sizes):
            op.target = _aten.split_with_sizes.default
            op.changes = {"self": op.arguments["self"], "split_sizes": sizes, "dim": along}
    elif sizes != chunk_sizes(sum(sizes), len(sizes)):
        op.target = _aten.split_with_sizes.default
        op.changes = {"self": op.arguments["self"], "split_sizes": sizes, "dim": along}


def even(sizes: list[int]) -> bool:
    """Could these be the parts of one dim split by the first one's size?"""
    return all(s == sizes[0] for s in sizes[:-1]) and 0 < sizes[-1] <= sizes[0]


def chunk_sizes(total: int, count: int) -> list[int]:
    """The sizes that torch.chunk gives."""
    step = -(-total // count)
    return [min(step, total - start) for start in range(0, total, step)] if step else []


@rewrites("slice.Tensor")
def _slice(op: Sized) -> None:
    assert op.source is not None
    along = op.arguments["dim"] % len(op.source.shape)
    if not op.narrowed(op.source, along):
        return
    size = op.source.shape[along]
    step = op.arguments["step"] or 1
    start, stop, _ = slice(op.arguments["start"], op.arguments["end"], step).indices(size)
    kept = op.indices(op.source, along)
    wanted = np.flatnonzero(np.isin(kept, np.arange(start, stop, step)))
    new_start, new_stop = int((kept < start).sum()), int((kept < stop).sum())
    if step > 1 and len(wanted):
        new_start = int(wanted[0])
    if list(range(new_start, new_stop, step)) == wanted.tolist():
        begin, end = (
            _as_written(op.arguments[k], at, len(kept)) for k, at in (("start", new_start), ("end", new_stop))
        )
        if op.arguments["start"] is not None and begin != op.arguments["start"]:
            op.changes["start"] = begin
        if stop < size and end != op.arguments["end"]:
            op.changes["end"] = end
        return
    op.target = _aten.index_select.default
    op.changes = {"self": op.arguments["self"], "dim": along, "index": torch.from_numpy(wanted)}


def _as_written(given: Any, position: int, size: int) -> int:
    """A position in a dim of this size, counted from its end where the one that was given is and that can be told."""
    return position - size if isinstance(given, int) and given < 0 and position < size else position


@rewrites("repeat", "tile")
def _repeat(op: Sized) -> None:
    assert op.source is not None
    old = list(op.arguments.get("repeats") or op.arguments["dims"])
    ones = (1,) * (len(op.outputs[0].shape) - len(op.source.shape))
    now = zip(op.shape(op.outputs[0]), ones + op.shape(op.source), strict=True)
    once = zip(op.outputs[0].shape, ones + op.source.shape, strict=True)
    counts = [(after // given, made // read) for (after, given), (made, read) in zip(now, once, strict=True)]
    offset = len(counts) - len(old)
    new = [times if (pair := counts[k + offset])[0] == pair[1] else pair[0] for k, times in enumerate(old)]
    if new != old:
        op.changes["repeats" if "repeats" in op.arguments else "dims"] = new


@rewrites("repeat_interleave.self_int")
def _repeat_interleave(op: Sized) -> None:
    assert op.source is not None
    if op.arguments["dim"] is None:
        return
    d = op.arguments["dim"] % len(op.source.shape)
    made = op.outputs[0]
    new = op.shape(made)[d] // op.shape(op.source)[d]
    if new != made.shape[d] // op.source.shape[d]:
        op.changes["repeats"] = new
    if op.arguments.get("output_size") is not None and op.narrowed(made, d):
        op.changes["output_size"] = op.size(op.arguments["output_size"], made, d)


@rewrites("deform_conv2d", of="torchvision")
@rewrites("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _groups(op: Sized) -> None:
    assert op.source is not None
    if _before(op, "groups") > 1:
        d = len(op.source.shape) - len(op.node.args[1].meta["val"].shape) + 1  # type: ignore[union-attr]
        _count_blocks(op, "groups", d)


@rewrites("convolution_backward")
def _groups_of_gradient(op: Sized) -> None:
    """The operator takes no other sizes of the bias than the channels of what it is given."""
    assert op.source is not None
    if op.narrowed(op.source, 1) and op.arguments["bias_sizes"] is not None:
        op.changes["bias_sizes"] = [op.shape(op.source)[1]]
    if _before(op, "groups") > 1:
        _count_blocks(op, "groups", 1)


@rewrites("group_norm")
def _num_groups(op: Sized) -> None:
    _count_blocks(op, "num_groups", 1)


@rewrites("native_group_norm", "native_group_norm_backward")
def _channels_and_groups(op: Sized) -> None:
    """N, C and HxW are sizes of what it is given, HxW of all dims but the first two."""
    assert op.source is not None
    before, now = op.source.shape, op.shape(op.source)
    counted = {"N": slice(0, 1), "C": slice(1, 2), "HxW": slice(2, None)}
    narrowed = [n for n, at in counted.items() if before[at] != now[at] and not isinstance(op.arguments[n], Node)]
    op.changes |= {name: math.prod(now[counted[name]]) for name in narrowed}
    _count_blocks(op, "group", 1)


@rewrites("channel_shuffle", "native_channel_shuffle")
def _shuffle_groups(op: Sized) -> None:
    _count_blocks(op, "groups", 1)


def _before(op: Sized, name: str) -> int:
    """A number before the cut, as it was for the example where it is computed."""
    given = by_name(op.node)[name]
    return size_hint(given.meta["val"]) if isinstance(given, Node) else int(given)


def _count_blocks(op: Sized, name: str, d: int) -> None:
    """How many blocks of channels are left, each narrowed by the same amount; of a number that is computed, the share."""
    assert op.source is not None
    before, given = _before(op, name), op.arguments[name]
    left = len(np.unique(op.indices(op.source, d) // (op.source.shape[d] // before)))
    if left != before:
        op.changes[name] = Share(given, Fraction(left, before)) if isinstance(given, Node) else left


@rewrites("constant_pad_nd", "pad")
def _pad(op: Sized) -> None:
    assert op.source is not None
    old = list(op.arguments["pad"])
    new = list(old)
    for k in range(len(old) // 2):
        d = len(op.source.shape) - 1 - k
        before, size = old[2 * k], op.source.shape[d]
        kept = op.indices(op.outputs[0], d)
        if op.narrowed(op.outputs[0], d):
            new[2 * k] = int((kept < before).sum())
            new[2 * k + 1] = int((kept >= before + size).sum())
    if new != old:
        op.changes["pad"] = new


@rewrites("scaled_dot_product_attention")
def _attention_scale(op: Sized) -> None:
    """Without an explicit scale, attention takes it from the width of the query: it stays what it was."""
    assert op.source is not None
    if op.arguments.get("scale") is None and op.narrowed(op.source, len(op.source.shape) - 1):
        op.changes["scale"] = op.source.shape[-1] ** -0.5
