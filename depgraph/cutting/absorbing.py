"""Numbers that the code computes from a size and that would drift with the cut are made up for in the weights.

Attention without an explicit scale takes it from the width of its queries; code that divides by ``sqrt(x.shape[-1])`` does
the same. What such an operator reads is followed back, through operators that pass a factor on, to the weights that make
it, and these are multiplied by what is missing.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from depgraph.cutting.expressing import Drift
from depgraph.errors import CutError
from depgraph.graph import Value
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Rows = np.ndarray
Found = dict[str, Rows]

_MOVES = frozenset(
    [
        *(
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "expand",
            "contiguous",
            "clone",
        ),
        *("transpose", "permute", "movedim", "t", "numpy_T", "slice", "select", "narrow", "index_select"),
        *("split", "split_with_sizes", "chunk", "unbind", "to", "_to_copy", "alias", "detach", "dropout"),
    ]
)
_LINEAR = frozenset(["linear", "conv1d", "conv2d", "addmm", "matmul", "mm"])
_EITHER = frozenset(["mul", "matmul", "bmm", "einsum"])
_ALL = frozenset(["add", "sub", "cat", "stack", "neg"])
_OF_A_WEIGHT = frozenset(
    [
        "t",
        "numpy_T",
        "transpose",
        "permute",
        "contiguous",
        "getitem",
        "split",
        "split_with_sizes",
        "chunk",
        "slice",
        "narrow",
    ]
)
_FIRST = frozenset(["div", "gather", "roll"])
_MOST_WAYS = 16


def absorb(graph: DependencyGraph, model: nn.Module, drifts: list[Drift], kept: Kept) -> None:
    """Multiply weights of the cut `model` so that every drift is made up for.

    Raises CutError where the way back to the weights is barred, or two drifts want different things of one weight.
    """
    done: dict[tuple[str, bytes], float] = {}
    search = _Search(graph)
    for drift in drifts:
        ways = search.back_from(drift)
        if not ways:
            raise CutError(
                f"{drift.where}: the code computes a number from a size, which the cut changes by a factor of {drift.ratio:.4f}, "
                "and no weight that only this reads can make up for it; use form='graph' (or 'auto')"
            )
        if any(all(abs(done.get(key, 0) - drift.factor) < 1e-9 for key in _keys(way)) for way in ways):
            continue
        way = next((w for w in ways if not any(key in done for key in _keys(w))), None)
        if way is None:
            raise CutError(
                f"{drift.where}: parameter {next(iter(ways[0]))!r} would have to make up for two different factors"
            )
        for target, rows in way.items():
            done[target, rows.tobytes()] = drift.factor
            _scale(graph, model, target, rows, kept, drift.factor)


def can_absorb(graph: DependencyGraph, drifts: list[Drift]) -> bool:
    """Is there a weight for every drift that can make up for it?"""
    search = _Search(graph) if drifts else None
    return search is None or all(search.back_from(drift) for drift in drifts)


def _keys(way: Found) -> list[tuple[str, bytes]]:
    return [(target, rows.tobytes()) for target, rows in way.items()]


def _scale(graph: DependencyGraph, model: nn.Module, target: str, rows: Rows, kept: Kept, factor: float) -> None:
    value = next(v for v in graph.capture.program.values.values() if v.target == target)
    tensor = model.get_parameter(target)
    d = _row_dim(value, rows)
    stays = kept.of(value, d)
    stays = np.arange(value.shape[d]) if stays is None else stays
    mask = torch.from_numpy(np.isin(stays, rows[:-1]))
    scale = torch.ones(len(stays), dtype=tensor.dtype).masked_fill(mask, factor).to(tensor.device)
    shape = [1] * tensor.ndim
    shape[d] = -1
    with torch.no_grad():
        tensor.mul_(scale.reshape(shape))


def _row_dim(value: Value, rows: Rows) -> int:
    """The last entry of `rows` says which dim they count along."""
    return int(rows[-1]) % len(value.shape)


@dataclass
class _Search:
    graph: DependencyGraph

    def __post_init__(self) -> None:
        self.nodes = {n.name: n for n in self.graph.capture.exported.graph.nodes}
        signature = self.graph.capture.exported.graph_signature
        self.parameters = dict(signature.inputs_to_parameters)

    def back_from(self, drift: Drift) -> list[Found]:
        """All ways to make up for a drift, the nearest first: which rows of which weights to scale."""
        node = self.nodes[drift.node]
        operands = [a for a in node.args if isinstance(a, Node)][
            : 2 if _name(node) == "scaled_dot_product_attention" else None
        ]
        return [way for operand in operands for way in self._walk(operand, [])]

    def _walk(self, node: Node, moves: list[Node]) -> list[Found]:
        """The weights (and which of their rows) that make `node`, in each way there is; none where no factor passes."""
        name = _name(node)
        if node.name in self.parameters:
            return [] if _picks(moves) else [self._whole(node)]
        if name == "getitem" or name in _MOVES:
            return self._walk(node.all_input_nodes[0], [node, *moves])
        if name in _LINEAR and (made := self._linear(node, moves)) is not None:
            return [made]
        if name == "embedding":
            table = node.all_input_nodes[0]
            return [] if _picks(moves) or not self._is_read_once(table) else [self._whole(table)]
        if name in ("layer_norm", "rms_norm"):
            return self._together([self._walk(a, []) for a in node.all_input_nodes[1:]])
        if name in _EITHER:
            return [way for a in node.all_input_nodes for way in self._walk(a, [])]
        if name in _FIRST and node.all_input_nodes:
            scaled, *others = node.all_input_nodes
            return [] if name == "div" and others else self._walk(scaled, [])
        if name in _ALL:
            return self._together([self._walk(a, []) for a in node.all_input_nodes])
        return []

    @staticmethod
    def _together(parts: list[list[Found]]) -> list[Found]:
        """One way of each part at once."""
        found = []
        for ways in itertools.islice(itertools.product(*parts), _MOST_WAYS):
            merged: Found = {}
            for target, rows in (item for way in ways for item in way.items()):
                both = np.union1d(rows[:-1], merged[target][:-1]) if target in merged else rows[:-1]
                merged[target] = np.append(both, rows[-1])
            found.append(merged)
        return found

    def _whole(self, node: Node) -> Found:
        size = node.meta["val"].shape[-1]
        return {self.parameters[node.name]: np.append(np.arange(size), -1)}

    def _is_read_once(self, node: Node) -> bool:
        """Is it a parameter that one operator reads, under one name?"""
        ties, target = self.graph.capture.program.ties, self.parameters.get(node.name, "")
        same = [name for name, first in ties.items() if first == ties.get(target, target)]
        return bool(target) and len(node.users) == 1 and len(same) <= 1

    def _linear(self, node: Node, moves: list[Node]) -> Found | None:
        """The rows of the weight (and of a bias) that make what `moves` leave of a product with a parameter."""
        operands = [(a, self._held(a)) for a in node.all_input_nodes]
        weights = [held for a, held in operands[1:] if held is not None and len(a.meta["val"].shape) > 1]
        if not weights:
            return None
        made = _rows(node, moves)
        widths, values = self.graph.widths, self.graph.capture.program.values
        out = values[node.name].dim(1 if _name(node).startswith("conv") else -1)
        found: Found = {}
        for operand, held in operands:
            if held is not None:
                dims = [
                    d for d, dim in enumerate(values[operand.name].dims) if widths.class_of(dim) == widths.class_of(out)
                ]
                source = held.rows(operand, dims[0]) if len(dims) == 1 else None
                if source is None or len(held.parameter.users) > 1:  # read elsewhere too
                    return None
                d, rows = source
                found[self.parameters[held.parameter.name]] = np.append(rows[made], d)
        return found

    def _held(self, node: Node) -> _Part | None:
        """The parameter that a node is, or a part of it, but for transposes."""
        moves: list[Node] = []
        while node.name not in self.parameters:
            if _name(node) not in _OF_A_WEIGHT or not node.all_input_nodes:
                return None
            moves.insert(0, node)
            node = node.all_input_nodes[0]
        return _Part(node, moves)


class _Part(NamedTuple):
    """What `moves` leave of a parameter."""

    parameter: Node
    moves: list[Node]

    def rows(self, operand: Node, dim: int) -> tuple[int, np.ndarray] | None:
        """Which dim of the parameter, and which of its indices, lie along dimension `dim` of `operand`; None if that varies."""
        shape = tuple(self.parameter.meta["val"].shape)
        for d, size in enumerate(shape):
            numbers: Any = torch.arange(size).reshape([-1 if k == d else 1 for k in range(len(shape))]).expand(shape)
            for move in self.moves:
                numbers = move.target(numbers, *move.args[1:], **move.kwargs)  # type: ignore[operator]
            along = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
            if size > 1 and bool((along == along[:, :1]).all()) and len(along[:, 0].unique()) == len(along):
                return d, along[:, 0].numpy()
        return None


def _name(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).split(".")[1].rstrip("_") if str(node.target).startswith("aten.") else ""


def _picks(moves: list[Node]) -> bool:
    return any(_name(m) in ("slice", "select", "getitem", "index_select", "narrow") for m in moves)


def _rows(node: Node, moves: list[Node]) -> Rows:
    """Which output features of a linear map are left after `moves`: they are carried out on the features' numbers."""
    shape = node.meta["val"].shape
    channels = 1 if _name(node).startswith("conv") else -1
    numbers: Any = torch.arange(shape[channels])
    numbers = numbers.reshape([-1 if d == channels % len(shape) else 1 for d in range(len(shape))]).expand(shape)
    for move in moves:
        call: Callable[..., Any] = move.target  # type: ignore[assignment]
        if _name(move) in ("dropout", "to", "_to_copy", "alias", "detach"):
            continue
        if _name(move) in ("view", "_unsafe_view"):  # numbers that were expanded have no strides to view them by
            call = torch.ops.aten.reshape.default
        numbers = call(*(numbers if isinstance(a, Node) else a for a in move.args), **move.kwargs)
    return np.unique(numbers.numpy())
