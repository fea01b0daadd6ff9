"""Size operands and attributes after a cut: one small function an operator, in a table.

An operator that isn't in the table has nothing that depends on a size. Each function sees the operator of the copy, whose
operands have their new shapes already, and says what of it must change for its results to have the sizes that the graph
predicts; what is computed from shapes and comes out right by itself stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from depgraph.errors import CutError
from depgraph.graph import Value
from depgraph.onnx_door.evaluating import attribute, place
from depgraph.rules.onnx_own import cut, slices
from depgraph.rules.registry import Op
from depgraph.widths import Kept

Numbers = dict[int, np.ndarray | None]


@dataclass
class Resized:
    """One operator under a cut.

    `op` is what the rule was given before the cut, `inputs` and `outputs` the operator's values then (None where they hold
    no data), `shapes` and `known` what its operands are now. Changes are noted: `operands` and `attributes` get new
    values (None takes an attribute away), `gathers` picks indices along dims of the first operand beforehand.
    """

    node: ir.Node
    op: Op
    inputs: list[Value | None]
    outputs: list[Value | None]
    kept: Kept
    shapes: list[tuple[int, ...] | None]
    known: Numbers
    operands: dict[int, np.ndarray] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    gathers: list[tuple[int, np.ndarray]] = field(default_factory=list)

    @property
    def source(self) -> Value:
        assert self.inputs[0] is not None
        return self.inputs[0]

    @property
    def output(self) -> Value:
        assert self.outputs[0] is not None
        return self.outputs[0]

    def size(self, value: Value, d: int) -> int:
        return self.kept.size(value.dim(d))

    def indices(self, value: Value, d: int) -> np.ndarray:
        """Kept indices of a dim, ascending."""
        kept = self.kept.of(value, d)
        return np.arange(value.shape[d]) if kept is None else kept

    def narrowed(self, value: Value, d: int) -> bool:
        return self.kept.of(value, d) is not None

    def numbers(self, position: int) -> list[int]:
        """An operand of whole numbers as it is now; raises CutError where it isn't known."""
        found = self.known.get(position)
        if found is None:
            raise CutError(
                f"{place(self.node)} takes sizes that are computed from the data, so that they can't follow the cut"
            )
        return [int(n) for n in found.reshape(-1)]

    def set_numbers(self, name: str, position: int, new: Sequence[int]) -> None:
        """Give a list as the attribute or the operand that it was."""
        if name in self.node.attributes:
            self.attributes[name] = [int(n) for n in new]
        else:
            self.operands[position] = np.array(new, dtype=np.int64)


Resize = Callable[[Resized], None]
TABLE: dict[str, Resize] = {}


def resizes(*names: str) -> Callable[[Resize], Resize]:
    """Put a function into the table, for operators of these names."""

    def register(function: Resize) -> Resize:
        for name in names:
            TABLE[name] = function
        return function

    return register


@resizes("Reshape")
def _reshape(op: Resized) -> None:
    wanted, target = op.kept.shape(op.output), op.numbers(1)
    shape = op.shapes[0]
    assert shape is not None
    zero = bool(attribute(op.node, "allowzero", 0))
    if _resolved(target, shape, zero) == wanted:
        return
    now = [size if size in (0, -1) or not op.narrowed(op.output, d) else wanted[d] for d, size in enumerate(target)]
    if _resolved(now, shape, zero) != wanted:
        now = [wanted[d] if op.narrowed(op.output, d) else size for d, size in enumerate(target)]
    if _resolved(now, shape, zero) != wanted:
        now = list(wanted)
    op.operands[1] = np.array(now, dtype=np.int64)


def _resolved(target: Sequence[int], shape: Sequence[int], zero: bool) -> tuple[int, ...] | None:
    """What Reshape makes of a shape; None where the numbers don't go into each other."""
    sizes = [shape[d] if n == 0 and not zero and d < len(shape) else n for d, n in enumerate(target)]
    total, known = math.prod(shape), math.prod(n for n in sizes if n != -1)
    if -1 in sizes:
        if not known or total % known:
            return None
        sizes[sizes.index(-1)] = total // known
    return tuple(sizes) if math.prod(sizes) == total else None


@resizes("Expand", "ConstantOfShape")
def _whole_shape(op: Resized) -> None:
    position = 1 if op.node.op_type == "Expand" else 0
    target = op.numbers(position)
    offset = len(op.output.shape) - len(target)
    now = [
        op.size(op.output, d + offset) if size != 1 and op.narrowed(op.output, d + offset) else size
        for d, size in enumerate(target)
    ]
    if now != target:
        op.operands[position] = np.array(now, dtype=np.int64)


@resizes("RandomNormal", "RandomUniform")
def _drawn(op: Resized) -> None:
    op.attributes["shape"] = list(op.kept.shape(op.output))


@resizes("Tile")
def _repeats(op: Resized) -> None:
    before = op.numbers(1)
    now = [op.size(op.output, d) // max(op.size(op.source, d), 1) for d in range(len(op.source.shape))]
    if now != before:
        op.operands[1] = np.array(now, dtype=np.int64)


@resizes("Resize")
def _sizes(op: Resized) -> None:
    """Only where sizes are given: scales suit any."""
    if op.known.get(3) is None or not len(op.numbers(3)):
        return
    before = op.numbers(3)
    axes = [d % len(op.source.shape) for d in attribute(op.node, "axes", range(len(op.source.shape)))]
    now = [op.size(op.output, d) if op.narrowed(op.output, d) else n for d, n in zip(axes, before, strict=True)]
    if now != before:
        op.operands[3] = np.array(now, dtype=np.int64)


@resizes("Split")
def _split(op: Resized) -> None:
    axis = int(attribute(op.node, "axis", 0))
    made = [value for value in op.outputs if value is not None]
    wanted = [op.size(value, axis) for value in made]
    if "split" in op.node.attributes or op.known.get(1) is not None:
        before = [int(n) for n in attribute(op.node, "split", None) or op.numbers(1)]
        if before != wanted:
            op.set_numbers("split", 1, wanted)
        return
    total, count = sum(wanted), len(wanted)
    step = -(-total // count)
    even = [min(step, max(total - k * step, 0)) for k in range(count)]
    if wanted == even and (total % count == 0 or op.op["opset"] >= 18):
        return
    if op.op["opset"] < 13:
        op.attributes["split"] = wanted
    else:
        op.operands[1] = np.array(wanted, dtype=np.int64)
        op.attributes["num_outputs"] = None


@resizes("Slice")
def _slice(op: Resized) -> None:
    rank = len(op.source.shape)
    before = slices(op.op, rank)
    narrowed = {d for d in range(rank) if op.narrowed(op.source, d)}
    if before is None or not narrowed & before.keys():
        return
    names = ("starts", "ends", "axes", "steps")
    now = {name: list(op.node.attributes[name].value) for name in names if name in op.node.attributes}
    now |= {name: op.numbers(k) for k, name in enumerate(names, 1) if op.known.get(k) is not None}
    axes = [int(a) % rank for a in now.get("axes", range(len(now["starts"])))]
    steps = now.get("steps", [1] * len(axes))
    changed = False
    for k, d in enumerate(axes):
        if d not in narrowed:
            continue
        kept, size = op.indices(op.source, d), op.source.shape[d]
        wanted = np.flatnonzero(np.isin(kept, np.arange(size)[before[d]]))
        if before[d].step and before[d].step < 0:
            wanted = wanted[::-1]
        got = np.arange(len(kept))[cut(now["starts"][k], now["ends"][k], steps[k])]
        if np.array_equal(got, wanted):
            continue
        start = int(wanted[0]) if len(wanted) else 0
        stop = int(wanted[-1]) + 1 if len(wanted) else 0
        if steps[k] < 0 or not np.array_equal(np.arange(start, stop, steps[k]), wanted):
            op.gathers.append((d, wanted))
            now["starts"][k], now["ends"][k] = 0, np.iinfo(np.int64).max
            now["steps"] = [1 if n == k else step for n, step in enumerate(steps)]
            steps, changed = now["steps"], True
            continue
        ends_open = now["ends"][k] >= op.source.shape[d] and stop == len(kept)
        now["starts"][k], now["ends"][k] = start, now["ends"][k] if ends_open else stop
        changed = True
    if changed:
        op.set_numbers("starts", 1, now["starts"])
        op.set_numbers("ends", 2, now["ends"])
        if op.gathers and len(op.inputs) > 4:
            op.set_numbers("steps", 4, now["steps"])


@resizes("Gather")
def _picks(op: Resized) -> None:
    """An index of the file counts what is left."""
    axis = int(attribute(op.node, "axis", 0)) % len(op.source.shape)
    picks = op.op["known"].get(1)
    if picks is None or picks.ndim != 1 or 1 not in op.op["constant"] or not op.narrowed(op.source, axis):
        return
    kept = op.indices(op.source, axis)
    chosen = picks[op.indices(op.output, axis)] % op.source.shape[axis]
    op.operands[1] = np.searchsorted(kept, chosen).astype(picks.dtype)


@resizes("Pad")
def _pads(op: Resized) -> None:
    rank = len(op.source.shape)
    given = attribute(op.node, "pads", None)
    before = [int(n) for n in (given if given is not None else op.numbers(1))]
    axes = [int(a) % rank for a in op.numbers(3)] if op.known.get(3) is not None else list(range(rank))
    now = list(before)
    for k, d in enumerate(axes):
        if op.narrowed(op.output, d):
            kept, first = op.indices(op.output, d), before[k]
            now[k] = int((kept < first).sum())
            now[k + len(axes)] = int((kept >= first + op.source.shape[d]).sum())
    if now != before:
        op.set_numbers("pads", 1, now)


@resizes("Conv", "DeformConv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv")
def _groups(op: Resized) -> None:
    before = int(attribute(op.node, "group", 1))
    if before > 1:
        _count_blocks(op, "group", before)


def _count_blocks(op: Resized, name: str, before: int) -> None:
    """How many blocks of channels are left, each narrowed by the same amount."""
    left = len(np.unique(op.indices(op.source, 1) // (op.source.shape[1] // before)))
    if left != before:
        op.attributes[name] = left


@resizes("GroupNormalization")
def _norm_groups(op: Resized) -> None:
    _count_blocks(op, "num_groups", int(attribute(op.node, "num_groups", 1)))


@resizes("LSTM", "GRU", "RNN")
def _hidden_size(op: Resized) -> None:
    back = op.inputs[2]
    assert back is not None
    if "hidden_size" in op.node.attributes and op.narrowed(back, 2):
        op.attributes["hidden_size"] = op.size(back, 2)


_HEADS = {"Attention": ("q_num_heads", "kv_num_heads"), "GroupQueryAttention": ("num_heads", "kv_num_heads")}


@resizes("Attention", "MultiHeadAttention", "GroupQueryAttention")
def _heads(op: Resized) -> None:
    """Numbers of heads, and the scale, which is taken from the width of the queries unless it is given."""
    if op.node.op_type == "Attention" and op.node.domain == "com.microsoft":
        _packed(op)
        return
    group, ratio, width, _ = op.op["lead"]
    groups, heads = op.kept.size(group), op.kept.size(group) * op.kept.size(ratio)
    sizes = op.op.relations.sizes
    if groups != sizes[group]:
        for name, now in zip(_HEADS.get(op.node.op_type, ("num_heads",)), (heads, groups), strict=False):
            if name in op.node.attributes:
                op.attributes[name] = now
    if op.kept.size(width) != sizes[width] and not attribute(op.node, "scale", 0.0):
        op.attributes["scale"] = float(sizes[width] ** -0.5)


def _packed(op: Resized) -> None:
    head, across, sizes = op.op["lead"]
    if op.kept.size(head) != op.op.relations.sizes[head]:
        op.attributes["num_heads"] = op.kept.size(head)
    now = [op.kept.size(part) for part in sizes]
    if len(set(now)) > 1 or (
        "qkv_hidden_sizes" in op.node.attributes and now != [op.op.relations.sizes[p] for p in sizes]
    ):
        op.attributes["qkv_hidden_sizes"] = now


@resizes("RotaryEmbedding")
def _turned_heads(op: Resized) -> None:
    dim = op.op.get("heads")
    if dim is not None and op.kept.size(dim) != op.op.relations.sizes[dim]:
        op.attributes["num_heads"] = op.kept.size(dim)
