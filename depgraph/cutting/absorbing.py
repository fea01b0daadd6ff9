"""Numbers that the code computes from a size and that would drift with the cut are made up for in the weights.

Attention without an explicit scale takes it from the width of its queries; code that divides by ``sqrt(x.shape[-1])`` does
the same. What such an operator reads is followed back, through operators that pass a factor on, to the weights that make
it, and these are multiplied by what is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from depgraph.cutting.degrees import operands, settles
from depgraph.cutting.elements import ZEROS, Elements, aten_name, rows_of
from depgraph.cutting.expressing import Drift
from depgraph.cutting.movements import ARRANGING, LIKE, PARTS, Move, Part, Spread, moved, picks, rows_left
from depgraph.errors import CutError
from depgraph.graph import Value
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Rows = np.ndarray
Found = dict[str, Rows]


class Twice(dict[str, Rows]):
    """Rows that make both operands of a product, which hold a factor as its root."""


_LINEAR = frozenset(["linear", "conv1d", "conv2d", "addmm", "matmul", "mm"])
_EITHER = frozenset(["matmul", "bmm", "einsum"])
_ALL = frozenset(["add", "sub", "neg"])
_JOINS = frozenset(["cat", "stack"])
_NORMS = {"layer_norm": -1, "rms_norm": -1, "batch_norm": 1}  # and the dim that their scales lie along
_BIAS = {"linear": 2, "conv1d": 2, "conv2d": 2, "addmm": 0}
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
_FIRST = frozenset(["gather", "roll", "pad", "constant_pad_nd", "view_as_complex", "view_as_real"])
_PASS = frozenset([*_EITHER, *_ALL, *_JOINS, *_NORMS, *_FIRST, "mul", "div", "getitem"])
_MOST_WAYS, _MOST_TRIED = 16, 256


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
        if any(all(abs(done.get(key, 0) - _on(way, drift)) < 1e-9 for key in _keys(way)) for way in ways):
            continue
        way = next((w for w in ways if not any(key in done for key in _keys(w))), None)
        if way is None:
            raise CutError(
                f"{drift.where}: parameter {next(iter(ways[0]))!r} would have to make up for two different factors"
            )
        for target, rows in way.items():
            done[target, rows.tobytes()] = _on(way, drift)
            _scale(graph, model, target, rows, kept, _on(way, drift))


def can_absorb(graph: DependencyGraph, drifts: list[Drift]) -> bool:
    """Is there a weight for every drift that can make up for it?"""
    search = _Search(graph) if drifts else None
    return search is None or all(search.back_from(drift) for drift in drifts)


def _on(way: Found, drift: Drift) -> float:
    """The factor that the rows of a way take."""
    return math.sqrt(drift.factor) if isinstance(way, Twice) else drift.factor


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
        self.ends: dict[Node, int] = {}
        self._inside: dict[Node, bool] = {}

    def back_from(self, drift: Drift) -> list[Found]:
        """All ways to make up for a drift, the nearest first: which rows of which weights to scale."""
        node = self.nodes[drift.node]
        count = 2 if aten_name(node) == "scaled_dot_product_attention" else len(node.args)
        found: list[Found] = []
        for place, operand in enumerate(node.args[:count]):
            if isinstance(operand, Node):
                self.ends = {node: place}
                self._inside = {}
                found += filter(None, self._walk(operand, []))
        return found

    def _walk(self, node: Node, moves: list[Move]) -> list[Found]:
        """The weights (and which of their rows) that make `node`, in each way there is; none where no factor passes."""
        name = aten_name(node)
        if node.name in self.parameters:
            return self._parameter(node, moves)
        if name in ZEROS:  # which no factor changes
            return [{}]
        if not self._is_inside(node) or _pads_with_another_number(node):
            return []
        if name == "getitem" or name in ARRANGING:
            return self._walk(node.all_input_nodes[0], [node, *moves])
        if name in _LINEAR and (made := self._linear(node, moves)) is not None:
            return [made]
        if name == "embedding":
            table = node.all_input_nodes[0]
            return [] if picks(moves) or not self._is_read_once(table) else [self._whole(table)]
        if name in _NORMS:
            scales = [a for a in node.all_input_nodes[1:] if a.name in self.parameters]
            return self._together([self._walk(a, [Spread.over(node, _NORMS[name]), *moves]) for a in scales])
        if name == "mul":
            return _of_one([self._walk(a, [Spread.over(node), *moves]) for a in operands(node)])
        if name in _ALL:
            return self._together([self._walk(a, [Spread.over(node), *moves]) for a in node.all_input_nodes])
        if name == "div" and len(node.all_input_nodes) == 1:
            return self._walk(node.all_input_nodes[0], moves)
        if any(True for _ in self._beside(moves)):
            return []
        if name in _EITHER:
            return _of_one([self._walk(a, []) for a in operands(node)])
        if name in _JOINS:
            return self._together([self._walk(a, []) for a in node.all_input_nodes])
        return self._walk(node.all_input_nodes[0], []) if name in _FIRST else []

    def _is_inside(self, node: Node) -> bool:
        """Does all that reads a tensor, but for other parts of it, lead to the operand that is followed back, or to no change?"""
        if node not in self._inside:
            leads = all(self._leads_there(node, user) for user in node.users)
            self._inside[node] = leads or settles(node, self.ends)
        return self._inside[node]

    def _leads_there(self, node: Node, user: Node) -> bool:
        if user in self.ends:
            places = [k for k, a in enumerate((*user.args, *user.kwargs.values())) if a is node]
            return places == [self.ends[user]]
        if not isinstance(user.meta.get("val"), (torch.Tensor, tuple, list)):  # a size
            return True
        name = aten_name(user)
        if name in PARTS or name in LIKE and user.args[0] is not node:
            return True
        return (name in ARRANGING or name in _PASS) and self._is_inside(user)

    def _parameter(self, node: Node, moves: list[Move]) -> list[Found]:
        """The rows of a parameter that `moves` leave, where nothing else reads it."""
        shape = tuple(node.meta["val"].shape)
        if not shape or not self._is_read_once(node):
            return []
        made = rows_of(shape, np.unique(moved(torch.arange(int(np.prod(shape))).reshape(shape), moves)))
        return [] if made is None else [{self.parameters[node.name]: np.append(made[1], made[0])}]

    @staticmethod
    def _together(parts: list[list[Found]]) -> list[Found]:
        """One way of each part at once, which scales each part once: what several parts hold is scaled for all of them."""
        found = []
        tried = itertools.islice(itertools.product(*parts), _MOST_TRIED)
        for ways in itertools.islice((ways for ways in tried if _for_all(ways, parts)), _MOST_WAYS):
            kinds = {type(way) for way in ways if way}
            if len(kinds) > 1:
                continue
            merged: Found = kinds.pop()() if kinds else {}
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

    def _linear(self, node: Node, moves: list[Move]) -> Found | None:
        """The rows of the weight (and of a bias) that make what `moves` leave of a product with a parameter."""
        operands = [(a, self._held(a)) for a in node.all_input_nodes]
        weights = [held for a, held in operands[1:] if held is not None and len(a.meta["val"].shape) > 1]
        if not weights:
            return None
        made = rows_left(node, moves)
        if any(len(np.intersect1d(made, rows_left(node, others))) for others in self._beside(moves)):
            return None
        bias = (
            node.args[_BIAS[aten_name(node)]] if len(node.args) > _BIAS.get(aten_name(node), len(node.args)) else None
        )
        widths, values = self.graph.widths, self.graph.capture.program.values
        out = values[node.name].dim(1 if aten_name(node).startswith("conv") else -1)
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
            elif operand is bias:
                parts = self._parts_of(operand, made)
                if parts is None:
                    return None
                found |= parts
        return found

    def _beside(self, moves: list[Move]) -> Iterator[list[Move]]:
        """The moves to what else is picked on the way that `moves` take, and leads elsewhere."""
        for number, move in enumerate(moves):
            if isinstance(move, Node):
                siblings = [u for u in move.all_input_nodes[0].users if u is not move and aten_name(u) in PARTS]
                yield from ([*moves[:number], u] for u in siblings if not self._is_inside(u))

    def _parts_of(self, bias: Node, made: Rows) -> Found | None:
        """The rows of the parameters that a bias is put together from, at the features `made`."""
        elements = Elements(self.parameters)
        numbers = elements.of(bias)
        found = elements.rows(numbers.numpy()[made]) if numbers.ndim == 1 else None
        if found is None or not all(self._is_read_once(node) for node in found):
            return None
        return {self.parameters[node.name]: np.append(rows, d) for node, (d, rows) in found.items()}

    def _held(self, node: Node) -> Part | None:
        """The parameter that a node is, or a part of it, but for transposes."""
        moves: list[Node] = []
        while node.name not in self.parameters:
            if aten_name(node) not in _OF_A_WEIGHT or not node.all_input_nodes:
                return None
            moves.insert(0, node)
            node = node.all_input_nodes[0]
        return Part(node, moves)


def _pads_with_another_number(node: Node) -> bool:
    """Does it put numbers beside its operand that aren't zero, which a factor would change?"""
    return "pad" in aten_name(node) and any(isinstance(a, (int, float)) and a != 0 for a in node.args[2:])


def _of_one(factors: list[list[Found]]) -> list[Found]:
    """The ways of each factor of a product that leave the others as they are; then those that are ways of both."""
    alone = [
        way
        for k, ways in enumerate(factors)
        for way in ways
        if not any(_meet(way, other) for j, others in enumerate(factors) if j != k for other in others)
    ]
    if len(factors) != 2:
        return alone
    plain = [[way for way in ways if way and not isinstance(way, Twice)] for ways in factors]
    first, second = ({frozenset(_keys(way)): way for way in ways} for ways in plain)
    return [*alone, *(Twice(way) for keys, way in first.items() if keys in second)]


def _for_all(ways: tuple[Found, ...], parts: list[list[Found]]) -> bool:
    """Is each weight that one of `ways`, the way of each part, scales also scaled by those of the parts that it makes?"""
    return not any(
        any(_meet({target: rows}, other) for other in parts[j]) and not _meet({target: rows}, ways[j])
        for k, way in enumerate(ways)
        for target, rows in way.items()
        for j in range(len(parts))
        if j != k
    )


def _meet(one: Found, other: Found) -> bool:
    """Do two ways scale some row of a weight in common?"""
    return any(target in other and len(np.intersect1d(rows[:-1], other[target][:-1])) for target, rows in one.items())
