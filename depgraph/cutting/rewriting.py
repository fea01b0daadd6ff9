"""Size arguments after a cut: what each captured operator must be called with once its dims are narrower.

One small function an operator, in a table. Each gets the operator's arguments by schema name and says which of them
change; an operator that isn't in the table has no argument that depends on a size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node

from depgraph.graph import Value
from depgraph.widths import Kept

_aten = torch.ops.aten
_LAST = 2**63 - 1


class Share(NamedTuple):
    """A size that the graph computes, times what is left of it."""

    size: Node
    left: Fraction


@dataclass
class Sized:
    """One captured operator under a cut: its arguments by schema name, and the kept indices of its tensors."""

    node: Node
    arguments: dict[str, Any]
    source: Value | None
    outputs: list[Value]
    kept: Kept
    changes: dict[str, Any] = field(default_factory=dict)
    target: Any = None

    def indices(self, value: Value, d: int) -> np.ndarray:
        """Kept indices of a dim, ascending."""
        kept = self.kept.of(value, d)
        return np.arange(value.shape[d]) if kept is None else kept

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.kept.shape(value)

    def narrowed(self, value: Value, d: int) -> bool:
        return self.kept.of(value, d) is not None

    def set_sizes(self, name: str, value: Value) -> None:
        """A list of sizes, one for each dim of `value`; sizes of dims that keep all indices stay as they were written."""
        old = list(self.arguments[name])
        offset = len(value.shape) - len(old)
        new = [
            size if size == -1 or not self.narrowed(value, d + offset) else self.size(size, value, d + offset)
            for d, size in enumerate(old)
        ]
        if new != old:
            self.changes[name] = new

    def size(self, size: Any, value: Value, d: int) -> Any:
        """The size of a dim after the cut; of one that holds the batch too (a size that is computed), the share that stays."""
        after, before = self.shape(value)[d], value.shape[d]
        return Share(size, Fraction(after, before)) if isinstance(size, Node) else after


Rewrite = Callable[[Sized], None]
_TABLE: dict[str, Rewrite] = {}


def rewrites(*names: str) -> Callable[[Rewrite], Rewrite]:
    """Put a function into the table, for ATen operators of these names."""

    def register(function: Rewrite) -> Rewrite:
        for name in names:
            _TABLE[f"aten.{name}"] = function
        return function

    return register


class Prepared(NamedTuple):
    """All that is known of an operator before a cut: what says what changes, and its tensors."""

    node: Node
    function: Rewrite
    arguments: dict[str, Any]
    source: Value | None
    outputs: list[Value]


def prepare(node: Node, values: dict[str, Value], actual: Node | None = None) -> Prepared | None:
    """Look an operator up; None where none of its arguments depends on a size.

    `actual` is the same operator in another capture (with symbolic sizes): its arguments are the ones to change.
    """
    target = str(node.target)
    function = _TABLE.get(target) or _TABLE.get(target.rsplit(".", 1)[0])
    if function is None:
        return None
    arguments = by_name(node)
    first = next((a for a in arguments.values() if isinstance(a, Node)), None)
    source = values.get(first.name) if first is not None else None
    many = isinstance(node.meta.get("val"), (tuple, list))
    names = [f"{node.name}:{k}" for k in range(len(node.meta["val"]))] if many else [node.name]
    outputs = [values[n] for n in names if n in values]
    return Prepared(node, function, by_name(actual) if actual is not None else arguments, source, outputs)


def rewritten(prepared: Prepared | None, kept: Kept) -> Sized | None:
    """What an operator must be called with after a cut; None when it stays as it is."""
    if prepared is None:
        return None
    sized = Sized(prepared.node, prepared.arguments, prepared.source, prepared.outputs, kept)
    prepared.function(sized)
    return sized if sized.changes or sized.target is not None else None


def rewrite(node: Node, values: dict[str, Value], kept: Kept, actual: Node | None = None) -> Sized | None:
    """`rewritten` of what `prepare` finds."""
    return rewritten(prepare(node, values, actual), kept)


def by_name(node: Node) -> dict[str, Any]:
    """The arguments of a captured operator by schema name, defaults filled in."""
    named = {}
    for k, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        named[declared.name] = (
            node.args[k] if k < len(node.args) else node.kwargs.get(declared.name, declared.default_value)
        )
    return named


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


@rewrites("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _normalized_shape(op: Sized) -> None:
    op.set_sizes("normalized_shape", op.outputs[0])


@rewrites("split_with_sizes", "unsafe_split_with_sizes", "split.sizes")
def _split_sizes(op: Sized) -> None:
    along = op.arguments["dim"]
    name = "split_size" if "split_size" in op.arguments else "split_sizes"
    new = [op.shape(v)[along] for v in op.outputs]
    if new != list(op.arguments[name]):
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
        if op.arguments["start"] is not None and new_start != op.arguments["start"]:
            op.changes["start"] = new_start
        if stop < size and new_stop != op.arguments["end"]:
            op.changes["end"] = new_stop
        return
    op.target = _aten.index_select.default
    op.changes = {"self": op.arguments["self"], "dim": along, "index": torch.from_numpy(wanted)}


@rewrites("repeat", "tile")
def _repeat(op: Sized) -> None:
    assert op.source is not None
    old = list(op.arguments.get("repeats") or op.arguments["dims"])
    before, after = op.shape(op.source), op.shape(op.outputs[0])
    before = (1,) * (len(after) - len(before)) + before
    new = [a // b for a, b in zip(after, before, strict=True)]
    if new != old:
        op.changes["repeats" if "repeats" in op.arguments else "dims"] = new


@rewrites("repeat_interleave.self_int")
def _repeat_interleave(op: Sized) -> None:
    assert op.source is not None
    if op.arguments["dim"] is None:
        return
    d = op.arguments["dim"] % len(op.source.shape)
    new = op.shape(op.outputs[0])[d] // op.shape(op.source)[d]
    if new != op.arguments["repeats"]:
        op.changes["repeats"] = new


@rewrites("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _groups(op: Sized) -> None:
    assert op.source is not None
    groups = op.arguments["groups"]
    if groups > 1:
        d = len(op.source.shape) - len(op.node.args[1].meta["val"].shape) + 1  # type: ignore[union-attr]
        _count_blocks(op, "groups", d, op.source.shape[d] // groups)


@rewrites("group_norm")
def _num_groups(op: Sized) -> None:
    assert op.source is not None
    _count_blocks(op, "num_groups", 1, op.source.shape[1] // op.arguments["num_groups"])


@rewrites("channel_shuffle", "native_channel_shuffle")
def _shuffle_groups(op: Sized) -> None:
    assert op.source is not None
    _count_blocks(op, "groups", 1, op.source.shape[1] // op.arguments["groups"])


def _count_blocks(op: Sized, name: str, d: int, block: int) -> None:
    """How many blocks of channels are left, each narrowed by the same amount."""
    assert op.source is not None
    left = len(np.unique(op.indices(op.source, d) // block))
    if left != op.arguments[name]:
        op.changes[name] = left


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


def call_arguments(sized: Sized, actual: Node | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The new arguments in call form, in the layout of the node's own where the operator is still the same."""
    if sized.target is not None:
        return tuple(sized.changes.values()), {}
    node = actual or sized.node
    declared = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    args = tuple(sized.changes.get(name, arg) for name, arg in zip(declared, node.args, strict=False))
    later = {name: new for name, new in sized.changes.items() if name not in declared[: len(node.args)]}
    return args, {**node.kwargs, **later}
