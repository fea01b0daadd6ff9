"""Ways back from an operator to the weights that make what it reads, through operators that pass a factor on.

A weight may be read several times where what each of its readers makes is to take the same factor: as in a block that is
applied over and over.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.fx import Node

from depgraph.cutting.degrees import operands, settles
from depgraph.cutting.elements import ZEROS, Elements, rows_of
from depgraph.cutting.expressing import Drift
from depgraph.cutting.movements import ARRANGING, LIKE, PARTS, Move, Part, Spread, moved, picks, rows_left
from depgraph.operators import aten_name

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Rows = np.ndarray
"""Indices of a parameter to scale; the last entry says along which dim."""


class Way(dict[str, Rows]):
    """Which rows of which weights to scale; `readers` are the operators that read these here."""

    readers: frozenset[tuple[str, Node]] = frozenset()

    @classmethod
    def of(cls, parts: Iterable[Way]) -> Way:
        """Several at once; what several of them hold is scaled for all of them."""
        merged = cls()
        for part in parts:
            merged.readers |= part.readers
            for target, rows in part.items():
                both = np.union1d(rows[:-1], merged[target][:-1]) if target in merged else rows[:-1]
                merged[target] = np.append(both, rows[-1])
        return merged


class Twice(Way):
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
_SPLITS = frozenset(["split", "split_with_sizes", "chunk"])
_FIRST = frozenset(["gather", "roll", "pad", "constant_pad_nd", "view_as_complex", "view_as_real"])
_PASS = frozenset([*_EITHER, *_ALL, *_JOINS, *_NORMS, *_FIRST, "mul", "div", "getitem"])
_MOST_WAYS, _MOST_TRIED = 16, 256
Key = tuple[str, bytes]


class Search:
    """Looks for the ways to make up for the drifts of one cut."""

    def __init__(self, graph: DependencyGraph, drifts: Sequence[Drift]) -> None:
        self.graph = graph
        self.nodes = {n.name: n for n in graph.capture.exported.graph.nodes}
        self.parameters = dict(graph.capture.exported.graph_signature.inputs_to_parameters)
        self.ends: dict[Node, int] = {}
        self._inside: dict[Node, bool] = {}
        self._named = {target: self.nodes[name] for name, target in self.parameters.items()}
        self._found = self._all(drifts)

    def ways(self, drift: Drift) -> list[Way]:
        """All ways to make up for a drift, the nearest first.

        A weight that is read elsewhere too is in none, unless the same rows are a way of all that read it.
        """
        return self._found[drift]

    def _all(self, drifts: Sequence[Drift]) -> dict[Drift, list[Way]]:
        alike: dict[float, list[Drift]] = defaultdict(list)
        for drift in drifts:
            alike[round(drift.factor, 9)].append(drift)
        found: dict[Drift, list[Way]] = {}
        for same in alike.values():
            ways = {drift: _apart(there) for drift, there in self._back_from(same).items()}
            found |= self._for_all_readers(ways)
        return found

    def _for_all_readers(self, ways: dict[Drift, list[Way]]) -> dict[Drift, list[Way]]:
        """Those of the ways whose weights are read by nothing that isn't on such a way."""
        while True:
            readers: dict[Key, set[Node]] = defaultdict(set)
            for way in (way for there in ways.values() for way in there):
                for target, reader in way.readers:
                    readers[target, way[target].tobytes()].add(reader)
            left = {
                drift: [way for way in there if all(readers[k] >= set(self._named[k[0]].users) for k in keys_of(way))]
                for drift, there in ways.items()
            }
            if sum(map(len, left.values())) == sum(map(len, ways.values())):
                return left
            ways = left

    def _back_from(self, same: Sequence[Drift]) -> dict[Drift, list[Way]]:
        """The ways of drifts that want the same factor, whoever else reads the weights."""
        nodes = {drift: self.nodes[drift.node] for drift in same}
        counts = {d: 2 if aten_name(n) == "scaled_dot_product_attention" else len(n.args) for d, n in nodes.items()}
        found: dict[Drift, list[Way]] = {drift: [] for drift in same}
        for place in range(max(counts.values())):
            self.ends, self._inside = dict.fromkeys(nodes.values(), place), {}
            for drift, node in nodes.items():
                if place < counts[drift] and isinstance(operand := node.args[place], Node):
                    found[drift] += filter(None, self._walk(operand, [], node))
        return found

    def _read(self, parameter: Node, rows: Rows, reader: Node) -> Way:
        """Rows of a parameter, to be scaled for one that reads it."""
        target = self.parameters[parameter.name]
        way = Way({target: rows})
        way.readers = frozenset([(target, reader)])
        return way

    def _walk(self, node: Node, moves: list[Move], reader: Node) -> list[Way]:
        """The weights (and which of their rows) that make `node`, for `reader`, in each way there is; none where no factor passes."""
        name = aten_name(node)
        if node.name in self.parameters:
            return self._parameter(node, moves, reader)
        if name in ZEROS:  # which no factor changes
            return [Way()]
        if not self._is_inside(node) or _pads_with_another_number(node):
            return []
        if name == "getitem" or name in ARRANGING:
            return self._walk(node.all_input_nodes[0], [node, *moves], node)
        if name in _LINEAR and (made := self._linear(node, moves)) is not None:
            return [made]
        if name == "embedding":
            table = node.all_input_nodes[0]
            return [] if picks(moves) or not self._has_one_name(table) else [self._whole(table, node)]
        if name in _NORMS:
            scales = [a for a in node.all_input_nodes[1:] if a.name in self.parameters]
            return self._together([self._walk(a, [Spread.over(node, _NORMS[name]), *moves], node) for a in scales])
        if name == "mul":
            return _of_one([self._walk(a, [Spread.over(node), *moves], node) for a in operands(node)])
        if name in _ALL:
            return self._together([self._walk(a, [Spread.over(node), *moves], node) for a in node.all_input_nodes])
        if name == "div" and len(node.all_input_nodes) == 1:
            return self._walk(node.all_input_nodes[0], moves, node)
        if any(True for _ in self._beside(moves)):
            return []
        if name in _EITHER:
            return _of_one([self._walk(a, [], node) for a in operands(node)])
        if name in _JOINS:
            return self._together([self._walk(a, [], node) for a in node.all_input_nodes])
        return self._walk(node.all_input_nodes[0], [], node) if name in _FIRST else []

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

    def _parameter(self, node: Node, moves: list[Move], reader: Node) -> list[Way]:
        """The rows of a parameter that `moves` leave of what `reader` reads."""
        shape = tuple(node.meta["val"].shape)
        if not shape or not self._has_one_name(node):
            return []
        made = rows_of(shape, np.unique(moved(torch.arange(int(np.prod(shape))).reshape(shape), moves)))
        return [] if made is None else [self._read(node, np.append(made[1], made[0]), reader)]

    @staticmethod
    def _together(parts: list[list[Way]]) -> list[Way]:
        """One way of each part at once, which scales each part once."""
        found = []
        tried = itertools.islice(itertools.product(*parts), _MOST_TRIED)
        for ways in itertools.islice((ways for ways in tried if _for_all(ways, parts)), _MOST_WAYS):
            kinds = {type(way) for way in ways if way}
            if len(kinds) <= 1:
                found.append(next(iter(kinds), Way).of(ways))
        return found

    def _whole(self, node: Node, reader: Node) -> Way:
        return self._read(node, np.append(np.arange(node.meta["val"].shape[-1]), -1), reader)

    def _has_one_name(self, node: Node) -> bool:
        """Is it a parameter with a single name?"""
        ties, target = self.graph.capture.program.ties, self.parameters.get(node.name, "")
        return bool(target) and sum(first == ties.get(target, target) for first in ties.values()) <= 1

    def _linear(self, node: Node, moves: list[Move]) -> Way | None:
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
        found = []
        for operand, held in operands:
            if held is not None:
                dims = [
                    d for d, dim in enumerate(values[operand.name].dims) if widths.class_of(dim) == widths.class_of(out)
                ]
                source = held.rows(operand, dims[0]) if len(dims) == 1 else None
                if source is None or any(len(m.users) > 1 and aten_name(m) not in _SPLITS for m in held.moves):
                    return None
                d, rows = source
                found.append(self._read(held.parameter, np.append(rows[made], d), next(iter(held.moves), node)))
            elif operand is bias:
                parts = self._parts_of(operand, made)
                if parts is None:
                    return None
                found.append(parts)
        return Way.of(found)

    def _beside(self, moves: list[Move]) -> Iterator[list[Move]]:
        """The moves to what else is picked on the way that `moves` take, and leads elsewhere."""
        for number, move in enumerate(moves):
            if isinstance(move, Node):
                siblings = [u for u in move.all_input_nodes[0].users if u is not move and aten_name(u) in PARTS]
                yield from ([*moves[:number], u] for u in siblings if not self._is_inside(u))

    def _parts_of(self, bias: Node, made: Rows) -> Way | None:
        """The rows of the parameters that a bias is put together from, at the features `made`."""
        elements = Elements(self.parameters)
        numbers = elements.of(bias)
        found = elements.rows(numbers.numpy()[made]) if numbers.ndim == 1 else None
        if found is None or not all(len(node.users) == 1 and self._has_one_name(node) for node in found):
            return None
        return Way.of(self._read(node, np.append(rows, d), next(iter(node.users))) for node, (d, rows) in found.items())

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


def _of_one(factors: list[list[Way]]) -> list[Way]:
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
    first, second = ({frozenset(keys_of(way)): way for way in ways} for ways in plain)
    return [*alone, *(Twice.of([way, second[keys]]) for keys, way in first.items() if keys in second)]


def _apart(ways: list[Way]) -> list[Way]:
    """Those that scale nothing which another one scales, as what makes both queries and keys does: they would get the factor twice."""
    return [way for way in ways if not any(_meet(way, other) for other in ways if other is not way)]


def _for_all(ways: tuple[Way, ...], parts: list[list[Way]]) -> bool:
    """Is each weight that one of `ways`, the way of each part, scales also scaled by those of the parts that it makes?"""
    return not any(
        any(_meet({target: rows}, other) for other in parts[j]) and not _meet({target: rows}, ways[j])
        for k, way in enumerate(ways)
        for target, rows in way.items()
        for j in range(len(parts))
        if j != k
    )


def _meet(one: Mapping[str, Rows], other: Way) -> bool:
    """Do two ways scale some row of a weight in common?"""
    return any(target in other and len(np.intersect1d(rows[:-1], other[target][:-1])) for target, rows in one.items())


def keys_of(way: Way) -> list[Key]:
    """The weights of a way and which of their rows it scales, to be compared."""
    return [(target, rows.tobytes()) for target, rows in way.items()]
