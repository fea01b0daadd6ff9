"""Where a residual stream can pass from one basis to another: the edges of a graph on which a product would be put.

A stretch of a stream that norms lie on, or linear maps read, has a basis of its own (SliceGPT, METHODS.md 2.11: one for every
normalisation). What is added to a later stretch passes a product on its way there. So does what nothing but a linear map may
read, where something else does: what a norm has scaled, before it is added (norms after the addition, or at the end of a
branch); what an operator does to every channel by itself; what the model puts out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from depgraph import DependencyGraph
from depgraph.consumers import Meeting
from depgraph.cutting.inserting import Product, places_of
from depgraph.errors import RotationError
from importance.commuting import JOINING
from importance.folding import own_name
from importance.stream_parts import Key, State, Use, name_of
from importance.streams import Reading


@dataclass(frozen=True)
class Parted:
    """The products that part a stream, and names of tied weights that must be weights of their own for that.

    `stretches` has for each stretch with a basis of its own a dim of a tensor that lies on it: of the model's, or of one of the
    products, by its number.
    """

    products: tuple[Product, ...]
    untied: tuple[str, ...]
    stretches: tuple[Key | tuple[int, int], ...]


def parted(graph: DependencyGraph, axis: str, ties: str = "untie", changing: Iterable[str] = ()) -> Parted:
    """How a stream, an axis of a graph, can be parted.

    `ties` is one of `folding.TIES`, where "keep" keeps stretches together that share a tensor. `changing`: the names of outputs that
    may become others.

    Raises RotationError, which names a place, where no stretch of it can be rotated.
    """
    reading = _Parting(graph, axis, frozenset(changing))
    for node in graph.capture.exported.graph.nodes:
        reading.see(node)
    return reading.done(ties)


@dataclass
class _Sets:
    """Nodes that must have one basis, as sets; a node stands for each."""

    parents: dict[Node, Node] = field(default_factory=dict)

    def find(self, node: Node) -> Node:
        while (parent := self.parents.get(node, node)) is not node:
            node = parent
        return node

    def join(self, one: Node, other: Node) -> None:
        first, second = self.find(one), self.find(other)
        if first is not second:
            self.parents[second] = first


class _Parting(Reading):
    """Follows one stream and notes what must have one basis and what needn't, where `Reading` would refuse."""

    def __init__(self, graph: DependencyGraph, axis: str, changing: frozenset[str]) -> None:
        super().__init__(graph, axis)
        self.changing = {value.name for name, value in self.program.outputs.items() if name in changing}
        self.sets = _Sets()
        self.loose: list[tuple[Node, Node]] = []
        self.through: list[tuple[Node, Node]] = []
        self.readings: list[tuple[Use, Node]] = []
        self.plain: list[Node] = []
        self.normed: list[Node] = []
        self.refusal: RotationError | None = None

    def _moving(self, node: Node) -> None:
        noted: tuple[list[Any], ...] = self.loose, self.through, self.stream.reads, self.stream.writes, self.readings
        before = [len(each) for each in noted]
        try:
            super()._moving(node)
        except RotationError as refusal:
            self.refusal = self.refusal or refusal
            for each, count in zip(noted, before, strict=True):
                del each[count:]
            self._apart(node)

    def _act(self, node: Node, name: str, on: list[Node]) -> State | None:
        state = super()._act(node, name, on)
        if state is None:
            return None
        noted = {*self.loose, *self.through}
        for given in on:
            if given in self.states and (given, node) not in noted:
                self.sets.join(given, node)
        if state.kind == "scaled" and state.norm is not None and state.norm.of is None:
            self.normed.append(node)
        return state

    def _apart(self, node: Node) -> None:
        """Let an operator have the channels as they were: it stays in the basis that the model came with."""
        self.through += [(given, node) for given in node.all_input_nodes if given in self.states]
        self.plain.append(node)
        if self._carried_on(node):
            self.states[node] = State("vector", node)

    def _carried_on(self, node: Node) -> bool:
        try:
            return self.along(node) is not None
        except RotationError:
            return False

    def vectors(self, node: Node, on: list[Node]) -> None:
        """Operands that add to a stretch may come from another; what a norm has scaled must come through a product."""
        for given in on:
            state = self.states.get(given)
            if state is None:
                self._write_or_pass(node, given)
            elif state.kind == "squares":
                raise self.refuse(node, f"uses {self.told(given)}, which only linear maps may read")
            elif state.kind == "scaled" and not self._scales_writer(state.norm):
                self.through.append((given, node))
            elif len(on) > 1 and name_of(node) in JOINING:
                self.loose.append((given, node))
            else:
                self.sets.join(given, node)

    def _write_or_pass(self, node: Node, given: Node) -> None:
        """What is computed from weights writes to a stretch if it is stored ones, moved about; else through a product."""
        try:
            self.writes(node, given)
        except RotationError:
            self.through.append((given, node))

    def _reads(self, node: Node, given: Node, met: Meeting | None) -> list[Use]:
        uses = super()._reads(node, given, met)
        self.readings += [(use, given) for use in uses]
        return uses

    def _output(self, node: Node) -> None:
        for made in node.all_input_nodes:
            value = self.program.values.get(made.name)
            if value is not None and value.name not in self.changing and made in self.states:
                self.through.append((made, node))
                self.plain.append(node)

    def _static(self, node: Node) -> None:
        try:
            super()._static(node)
        except RotationError:
            self.roots[node] = None

    def done(self, ties: str) -> Parted:
        """The products, from all that was noted."""
        self._pass_on()
        untied = self._shared(ties)
        turned = self._turned()
        edges = self._edges(turned)
        stretches: dict[Node, Key | tuple[int, int]] = {}
        for number, (given, to) in enumerate(edges):
            stretches.setdefault(to, (number, 0))
            stretches.setdefault(self.sets.find(given), (number, 1))
        for use, at in self._uses():
            stretches[self.sets.find(at)] = use.key
        if not turned:
            raise self.refusal or self.refuse(next(iter(self.states)), "is read by no linear map after a normalisation")
        products = tuple(self._product(given, users) for (given, _), users in edges.items())
        return Parted(products, untied, tuple(key for at, key in stretches.items() if at in turned))

    def _uses(self) -> list[tuple[Use, Node]]:
        """What writes to the stream and what reads it, each with a node of the stretch on which that happens."""
        return [*((use, use.op) for use in self.stream.writes), *self.readings]

    def _pass_on(self) -> None:
        """Let what nothing needs in a basis of its own have the basis of the stretch that it is added to."""
        needed = {self.sets.find(node) for node in (*self.plain, *self.normed)}
        needed |= {self.sets.find(given) for given, _ in self.through}
        needed |= {self.sets.find(given) for _, given in self.readings}
        for given, node in reversed(self.loose):
            here = self.sets.find(given)
            targets = {self.sets.find(to) for at, to in self.loose if self.sets.find(at) is here}
            if here not in needed and len(targets) == 1:
                self.sets.join(node, given)

    def _shared(self, ties: str) -> tuple[str, ...]:
        """Names of tensors that need be their own; where stretches share one that can't be, they are made one stretch."""
        users: dict[str, list[tuple[Use, Node]]] = defaultdict(list)
        for use, at in self._uses():
            users[use.target].append((use, at))
        untied: list[str] = []
        for here in users.values():
            named: dict[str, set[Node]] = defaultdict(set)
            for use, at in here:
                named[own_name(self.program, use)].add(self.sets.find(at))
            if len(set().union(*named.values())) > 1 and ties == "untie" and all(len(at) == 1 for at in named.values()):
                untied += list(named)[1:]
                continue
            for _, at in here[1:]:
                self.sets.join(here[0][1], at)
        return tuple(untied)

    def _turned(self) -> set[Node]:
        """The stretches that get a basis of their own: which a normalisation lies on, or a weight of the model's reads."""
        plain = {self.sets.find(node) for node in self.plain}
        wanted = {self.sets.find(node) for node in (*self.normed, *(given for _, given in self.readings))}
        return wanted - plain

    def _edges(self, turned: set[Node]) -> dict[tuple[Node, Node], list[Node]]:
        """Who takes what a node made through one product: from this node to that stretch."""
        found: dict[tuple[Node, Node], list[Node]] = {}
        forced = set(self.through)
        for given, node in (*self.loose, *self.through):
            here, there = self.sets.find(given), self.sets.find(node)
            if (here is not there or (given, node) in forced) and turned & {here, there}:
                found.setdefault((given, there), []).append(node)
        order = {node: k for k, node in enumerate(self.graph.capture.exported.graph.nodes)}
        return dict(sorted(found.items(), key=lambda edge: min(order[node] for node in edge[1])))

    def _product(self, given: Node, users: list[Node]) -> Product:
        dim = self.along(given)
        assert dim is not None
        places = [place for user in dict.fromkeys(users) for place in places_of(user, given)]
        return Product(tuple(places), dim, self.axis.size)
