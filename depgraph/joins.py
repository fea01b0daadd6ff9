"""Where a captured graph adds: what each addition joins, and the walks between two of its nodes.

A *join* is an operator that gives one of its operands plus something else, so that it can be left out by passing that
operand on. Chains of additions are one sum: `h + attention(h) + mlp(h)` has two joins and three *terms*.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from torch.fx import Node

from depgraph.cutting.mutating import Write, memory_of, writes
from depgraph.operators import argument
from depgraph.walks import moving, reached

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_COPIES = ("to", "to_copy", "clone", "contiguous", "detach", "alias", "dropout", "feature_dropout", "lift_fresh_copy")
_VIEWS = ("view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze", "t")
_SUMS = {
    "add": ("self", "other"),
    "sub": ("self", "other"),
    "addcmul": ("self", "tensor1", "tensor2"),
    "addmm": ("self", "mat1", "mat2"),
    "addbmm": ("self", "batch1", "batch2"),
    "baddbmm": ("self", "batch1", "batch2"),
}


@dataclass(frozen=True)
class Join:
    """Operator `node`; leaving out `operands`, all that goes with one another, means that `rest` goes on in its place.

    `scaled` says that the rest doesn't go on as it is: the operator multiplies it.
    """

    node: Node
    operands: tuple[Node, ...]
    rest: Node
    scaled: bool


def is_node(item: Any) -> TypeGuard[Node]:
    """Is something a node of a captured graph, or a step of a file, rather than a plain argument?"""
    return hasattr(item, "all_input_nodes")


def name_of(node: Node) -> str:
    """`conv2d` for aten.conv2d.default, `add` for aten.add_.Tensor."""
    return _name(node.target) if node.op == "call_function" else ""


@lru_cache(maxsize=4096)
def _name(target: object) -> str:
    parts = str(target).split(".")
    return (parts[1] if len(parts) > 1 else parts[0]).strip("_")


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of the tensor that a node makes; None where it makes none, or several."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(shape)


def is_floating(node: Node) -> bool:
    """Does a node make a tensor of fractions?"""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)


def copies(node: Node) -> bool:
    """Does a node give the numbers that it is given, in the same places?"""
    if name_of(node) not in _COPIES or len(node.all_input_nodes) != 1 or argument(node, "train", False):
        return False
    made, source = node.meta.get("val"), node.all_input_nodes[0].meta.get("val")
    return getattr(made, "dtype", None) == getattr(source, "dtype", 0) and shape_of(node) == tuple(source.shape)  # type: ignore[union-attr]


class Flow:
    """A captured graph as what flows through it: which nodes depend on the inputs, what is between two nodes, what dies."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.values = graph.capture.program.values
        self.nodes: list[Node] = list(graph.nodes)
        self.index = {node: k for k, node in enumerate(self.nodes)}
        self.inputs = {node: tuple(node.all_input_nodes) for node in self.nodes}
        self.moving: set[Node] = moving(self.nodes, self.values)
        self.writes: list[Write] = writes(self.nodes)
        self.read: dict[Node, list[Node]] = {node: list(self.inputs[node]) for node in self.nodes}
        self.readers: dict[Node, set[Node]] = {node: set(node.users) for node in self.nodes}
        self.lasting = {node for node in self.nodes if node.op != "call_function"}
        self._follow_memory()
        self._sums: dict[Node, Node | None] = {}
        self._tops: dict[Node, Node] = {}
        self._common: dict[frozenset[Node], Node | None] = {}
        self.unread: set[Node] = set()
        for node in reversed(self.nodes):
            if node not in self.lasting and self.unread.issuperset(self.readers[node]):
                self.unread.add(node)

    def _follow_memory(self) -> None:
        """Let who reads memory be a reader of all that was written there before."""
        sharing: dict[Node, list[Node]] = defaultdict(list)
        for node in self.nodes if self.writes else ():
            sharing[memory_of(node)].append(node)
        for write in self.writes:
            writer, root = write.writer, write.root
            if root.op != "call_function":
                self.lasting.add(writer)
            for reader in {user for alias in sharing[root] for user in alias.users}:
                if self.index[reader] > self.index[writer]:
                    self.readers[writer].add(reader)
                    self.read[reader].append(writer)

    @cached_property
    def joins(self) -> list[Join]:
        """All joins, in order of execution; an addition of two terms is one for each of them."""
        return [join for node in self.nodes for join in self._joins(node)]

    def _joins(self, node: Node) -> Iterator[Join]:
        name = name_of(node)
        operands = [argument(node, operand, None) for operand in _SUMS.get(name, ())]
        if not operands or not all(map(is_node, operands)) or operands[0] in operands[1:]:
            return
        first, *others = operands
        beta = argument(node, "beta", 1) != 1
        if first in self.moving and not self.moving.isdisjoint(others):
            yield Join(node, tuple(dict.fromkeys(others)), first, beta)
        if name == "add" and {first, others[0]} <= self.moving:
            yield Join(node, (first,), others[0], argument(node, "alpha", 1) != 1)

    def top(self, node: Node) -> Node:
        """The last addition of the sum that an addition belongs to."""
        passed: list[Node] = []
        while node not in self._tops and (outer := self._added_to(node)) is not None:
            passed.append(node)
            node = outer
        found = self._tops.setdefault(node, node)
        self._tops.update(dict.fromkeys(passed, found))
        return found

    def _added_to(self, node: Node) -> Node | None:
        """The addition of the same shape that alone reads `node`, or a copy of it."""
        here = node
        while len(here.users) == 1:
            here = next(iter(here.users))
            if name_of(here) == "add" and self.moving.issuperset(here.all_input_nodes) and _sums_two(here):
                return here if shape_of(here) == shape_of(node) else None
            if not copies(here):
                return None
        return None

    def terms(self, node: Node, but: tuple[Node, ...] = ()) -> Iterator[Node]:
        """The terms of the sum that ends in `node`, except what is under the operands `but`."""
        return self._terms([operand for operand in node.all_input_nodes if operand not in but], but)

    def parts(self, operand: Node) -> Iterator[Node]:
        """The terms that an operand of an addition consists of."""
        return self._terms([operand], ())

    def _terms(self, operands: list[Node], but: tuple[Node, ...]) -> Iterator[Node]:
        """Sums may have thousands of terms, one within the other, so there is a list of what is left and no recursion."""
        left = operands[::-1]
        while left:
            operand = left.pop()
            inner = self.sum_in(operand)
            if inner is None:
                yield operand
            else:
                left.extend(o for o in reversed(inner.all_input_nodes) if o not in but)

    def sum_in(self, operand: Node) -> Node | None:
        """The addition that an operand of another one is, or is a copy of, where nothing else reads it."""
        if operand not in self._sums:
            self._sums[operand] = self._sum_in(operand)
        return self._sums[operand]

    def _sum_in(self, operand: Node) -> Node | None:
        here = operand
        while copies(here) and len(here.users) == 1:
            here = here.all_input_nodes[0]
        if (
            name_of(here) == "add"
            and len(here.users) == 1
            and _sums_two(here)
            and self.moving.issuperset(here.all_input_nodes)
        ):
            return here
        return None

    def origins(self, node: Node) -> Iterator[Node]:
        """A node, and what it shows the numbers of, unchanged but for their layout."""
        yield node
        while copies(node) or (name_of(node) in (*_VIEWS, *_COPIES) and len(node.all_input_nodes) == 1):
            node = node.all_input_nodes[0]
            yield node

    def original(self, node: Node) -> Node:
        """The node that a node is a plain copy of."""
        while copies(node):
            node = node.all_input_nodes[0]
        return node

    def between(self, start: Node, ends: tuple[Node, ...]) -> set[Node]:
        """The nodes that are computed from `start` and that `ends` are computed from, these included; empty where there are none."""
        found: set[Node] = {start}
        for node in sorted(self.above(ends, self.index[start] + 1), key=self.index.__getitem__):
            if not found.isdisjoint(self.inputs[node]):
                found.add(node)
        return found - {start}

    def above(self, ends: tuple[Node, ...], first: int) -> set[Node]:
        """The nodes that `ends` are computed from, from number `first` on, and `ends` themselves."""
        return set(reached(ends, lambda node: (n for n in self.inputs[node] if self.index[n] >= first)))

    def common(self, a: Node, b: Node) -> Node | None:
        """The last node that both are computed from, among those that depend on the inputs."""
        pair = frozenset((a, b))
        if pair not in self._common:
            self._common[pair] = self._last_common(a, b)
        return self._common[pair]

    def _last_common(self, a: Node, b: Node) -> Node | None:
        seen: dict[Node, int] = {a: 1, b: 2}
        queue = [(-self.index[n], n.name, n) for n in (a, b)]
        heapq.heapify(queue)
        while queue:
            *_, node = heapq.heappop(queue)
            if seen[node] == 3:
                return node
            for above in (n for n in self.inputs[node] if n in self.moving):
                if above not in seen:
                    heapq.heappush(queue, (-self.index[above], above.name, above))
                seen[above] = seen.get(above, 0) | seen[node]
        return None

    def dying(self, join: Join) -> set[Node]:
        """What nothing reads any more once a join is left out."""
        parted = {(operand, join.node) for operand in join.operands}
        return self.dead({*parted, *self.passed(join.node, join.rest)})

    def passed(self, node: Node, instead: Node) -> Iterator[tuple[Node, Node]]:
        """Pairs of what wrote into the memory of `node` and who read that there, parted where `instead` goes on in its place."""
        root = memory_of(node)
        if root is memory_of(instead):
            return
        for writer in (w.writer for w in self.writes if w.root is root and self.index[w.writer] < self.index[node]):
            yield from ((writer, reader) for reader in self.readers[writer] if self.index[reader] > self.index[node])

    def dead(
        self, unread: Iterable[tuple[Node, Node]], also: Mapping[Node, set[Node]] = MappingProxyType({})
    ) -> set[Node]:
        """What nothing reads any more once these pairs of a node and its reader are parted; `also` has new readers."""
        parted: dict[Node, set[Node]] = defaultdict(set)
        for node, reader in unread:
            parted[node].add(reader)
        gone, found = set(self.unread), set[Node]()
        queue = [(-self.index[n], n.name, n) for n in parted]
        heapq.heapify(queue)
        while queue:
            *_, node = heapq.heappop(queue)
            readers = self.readers[node] - parted.get(node, set())
            if node in found or node in self.lasting or readers - gone or not gone.issuperset(also.get(node, ())):
                continue
            found.add(node)
            gone.add(node)
            for above in self.read[node]:
                heapq.heappush(queue, (-self.index[above], above.name, above))
        return found


def _sums_two(node: Node) -> bool:
    return len(node.all_input_nodes) == 2 and argument(node, "alpha", 1) == 1
