"""Residual branches: where an addition joins a stream with something computed from it, which can then be left out.

All is read from the captured graph: what lies between the stream and the addition, what else reads it, and what is
computed with. Names only say where that happens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from torch.fx import Node

from depgraph.descent import Descent
from depgraph.joins import Flow, Join, copies, name_of, shape_of
from depgraph.kinds import Kinds
from depgraph.paths import around, common_path, is_in

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_SCALINGS = ("mul", "div")


@dataclass(frozen=True)
class Branch:
    """Something that an addition joins with the stream that it was computed from; without it, the stream goes on alone.

    `nodes` are the names of the graph's nodes that go with it; `source` and `add` those of the stream where it starts and
    of the addition, of which it is (or they are) the `operands`. `parameters` are names of those that only it uses, `params`
    the number of their elements, and `macs` what its nodes multiply and add. `kind` is "attention", "convolution", "mlp"
    or "other". `order` counts the branches in order of execution.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    source: str
    add: str
    operands: tuple[str, ...]
    parameters: tuple[str, ...]
    params: int
    macs: int
    order: int


@dataclass(frozen=True)
class Candidate:
    """What may be a branch: a join, the stream, the nodes between them and those that go; or `why` they can't."""

    join: Join
    source: Node
    inner: frozenset[Node]
    gone: frozenset[Node]
    why: str = ""


class Branches:
    """The branches of a graph: `found`, in order of execution, and by name why others can't go (`refused`)."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self.program = graph.capture.program
        self.flow = Flow(graph)
        self.kinds = Kinds(self.program, self.flow)
        self.works, self.macs = self.kinds.works, self.kinds.macs
        self.entries = graph.entries
        self._modules: dict[Node, str] = {}
        joins = (join for join in self.flow.joins if join.node not in self.flow.unread)
        candidates = [c for join in joins if (c := self._candidate(join)) is not None]
        self.candidates = self._without_sums([c for c in candidates if not c.why])
        self.refusals = [c for c in candidates if c.why and not self._idle(c)]
        self.found, self.refused = self._named(self.candidates, self.refusals)

    def module(self, node: Node) -> str:
        """The path of the module in which a node is computed."""
        if node not in self._modules:
            self._modules[node] = self._module(node)
        return self._modules[node]

    def _module(self, node: Node) -> str:
        value = self.program.values.get(node.name) or self.program.values.get(f"{node.name}:0")
        return value.module if value is not None else str(node.meta.get("module", ""))

    def idle(self, node: Node) -> bool:
        """Does a node compute nothing that is read?"""
        return copies(node) or node in self.flow.unread or not node.users

    def _candidate(self, join: Join) -> Candidate | None:
        """The branch that `join` adds, or why it is none; None where it doesn't look like one."""
        first: Candidate | None = None
        for stream in self._streams(join) if shape_of(join.rest) == shape_of(join.node) else ():
            found = self._from(join, stream)
            first = first or found
            if found is not None and (not found.why or self._stays(found)):
                return found
        return first or self._without_stream(join)

    def _stays(self, found: Candidate) -> bool:
        """Can what an addition joins not go, whatever stream it is from? It is read elsewhere too, or the rest is multiplied."""
        join = found.join
        return join.scaled or len(join.operands) == 1 and join.operands[0] not in found.gone

    def _streams(self, join: Join) -> list[Node]:
        """The terms that `join` adds its operands to, and what they show, that all of these are computed from; the last first."""
        index, last = self.flow.index, max(self.flow.index[operand] for operand in join.operands)
        terms = self.flow.terms(self.flow.top(join.node), join.operands)
        streams = {n for term in terms for n in self.flow.origins(term) if index[n] < last}
        if not streams:
            return []
        added = (part for operand in join.operands for part in self.flow.parts(operand) if part in self.flow.moving)
        found = self._descent.among(streams.difference(join.operands), added)
        return sorted(found, key=index.__getitem__, reverse=True)

    @cached_property
    def _descent(self) -> Descent:
        """What the nodes are computed from, among all terms of all sums and what they show."""
        tops = dict.fromkeys(self.flow.top(join.node) for join in self.flow.joins)
        terms = dict.fromkeys(term for top in tops for term in self.flow.terms(top))
        return Descent(self.flow.inputs, dict.fromkeys(n for term in terms for n in self.flow.origins(term)))

    def _from(self, join: Join, stream: Node) -> Candidate | None:
        inner = self.flow.between(stream, join.operands)
        if self.kinds.working.isdisjoint(inner):
            return None
        source = self.flow.original(stream)
        if source is not stream:
            inner |= self.flow.between(source, join.operands)
        gone = self.flow.dying(join)
        found = Candidate(join, source, frozenset(inner), frozenset(gone))
        return replace(found, why=self._refusal(found))

    def _refusal(self, found: Candidate) -> str:
        """Why what is between a stream and an addition can't be left out."""
        flow, join = self.flow, found.join
        if len(join.node.all_input_nodes) == 2 and shape_of(join.operands[0]) != shape_of(join.node):
            return f"it isn't of the size of the stream that it is added to, at {join.node.name}"
        if join.scaled:
            return f"the stream is multiplied where it is added, at {join.node.name}"
        for node in sorted(found.inner - found.gone, key=flow.index.__getitem__):
            others = flow.readers[node] - found.inner - flow.unread
            if others and any(self.works(n) for n in {node, *(flow.between(found.source, (node,)) & found.inner)}):
                return f"{node.name}, inside it, is also {self._read_by(min(others, key=flow.index.__getitem__))}"
        for write in flow.writes:
            if write.writer in found.gone and write.root in flow.moving and write.root not in found.gone:
                return f"{write.writer.name}, inside it, writes into {write.root.name}, which stays"
        return ""

    def _read_by(self, reader: Node) -> str:
        while len(reader.users) == 1 and not self.works(reader):
            reader = next(iter(reader.users))
        if reader.op == "output":
            return "an output of the model"
        return f"read by {reader.name}" + (f" in {self.module(reader)}" if self.module(reader) else "")

    def _without_stream(self, join: Join) -> Candidate | None:
        """Why a join of two things computed from one has no branch: its shortcut does something of its own."""
        if join.rest in self.flow.between(join.node, join.operands) or len(join.operands) > 1:
            return None
        source = self.flow.common(join.rest, join.operands[0])
        if source is None or source in (join.rest, join.operands[0]):
            return None
        inner = self.flow.between(source, join.operands)
        ours = len(inner & self.kinds.working)
        if ours < 1:
            return None
        shortcut = self.flow.between(source, (join.rest,))
        theirs = len(shortcut & self.kinds.working)
        if theirs > 1 or theirs == 1 and ours < 2:
            return None
        found = Candidate(join, self.flow.original(source), frozenset(inner), frozenset())
        changes = [n for n in sorted(shortcut, key=self.flow.index.__getitem__) if not copies(n)]
        at = next(filter(self.works, changes), None)
        if at is not None:
            return replace(
                found, why=f"its shortcut isn't plain: it goes through {at.name} in {self.module(at) or 'the model'}"
            )
        if changes and all(name_of(n) in _SCALINGS for n in changes):
            return replace(found, why=f"its stream is multiplied before it is added, at {changes[0].name}")
        return replace(found, why=f"its shortcut isn't plain: it goes through {changes[0].name}") if changes else None

    def _without_sums(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates but those that are sums of others, each a branch of the same stream."""
        parts = Counter((c.join.node, c.source) for c in candidates)

        def is_sum(candidate: Candidate) -> bool:
            inner = self.flow.sum_in(candidate.join.operands[0])
            return inner is not None and parts[inner, candidate.source] == 2

        return [c for c in candidates if not is_sum(c)]

    def _idle(self, refused: Candidate) -> bool:
        """Is it of no interest that this can't go?

        It lies inside a branch that can go and holds no others, or is no branch, but computed from a stream further up:
        there are additions of branches in between that started elsewhere.
        """
        across = (c for c in self.candidates if c.join.node in refused.inner)
        if any(c.source is not refused.source and c.source not in refused.inner for c in across):
            return True
        around = [c for c in self.candidates if refused.join.node in c.gone]
        return any(not any(c.join.node in outer.gone for c in self.candidates) for outer in around)

    def _named(self, good: list[Candidate], bad: list[Candidate]) -> tuple[tuple[Branch, ...], dict[str, str]]:
        kinds = [self.kinds.of(c.inner & c.gone or c.inner) for c in good]
        places = [self.place(c) for c in good]
        adds, others = [self.module(c.join.node) for c in (*good, *bad)], [self.place(c) for c in bad]
        adding = {path for add in set(adds) for path in around(add)}
        held = Counter(path for place in (*places, *others) for path in around(place))
        self.holders = tuple(entry for entry in self.entries if entry in adding or held[entry] > 1)
        names = unique(list(zip(places, kinds, strict=True)), self.holders)
        branches = tuple(self._branch(*row) for row in zip(good, names, kinds, range(len(good)), strict=True))
        taken = {*names, *self.holders}
        refused = unique([(place, self.kinds.of(c.inner)) for place, c in zip(others, bad, strict=True)], taken)
        return branches, {name: c.why for name, c in zip(refused, bad, strict=True)}

    def _branch(self, found: Candidate, name: str, kind: str, order: int) -> Branch:
        gone = sorted(found.gone, key=self.flow.index.__getitem__)
        parameters = self.parameters(found.gone)
        return Branch(
            name,
            kind,
            tuple(n.name for n in gone),
            found.source.name,
            found.join.node.name,
            tuple(n.name for n in found.join.operands),
            parameters,
            self.size(parameters),
            self.macs((*gone, found.join.node)),
            order,
        )

    @cached_property
    def _used(self) -> dict[str, list[Node]]:
        """The nodes of each parameter, a tied one's under its first name."""
        used: dict[str, list[Node]] = defaultdict(list)
        for node in self.flow.nodes:
            value = self.program.values.get(node.name)
            if value is not None and value.kind == "parameter" and node.users:
                used[self.program.ties.get(value.target, value.target)].append(node)
        return used

    def parameters(self, gone: Iterable[Node]) -> tuple[str, ...]:
        """Names of the parameters that no node but those of `gone` uses, under any of their names."""
        going = {*gone, *self.flow.unread}
        read = {self._place[n] for node in going for n in self.flow.inputs[node] if n in self._place}
        known = (self._held[place] for place in sorted(read))
        alone = (nodes[0] for nodes in known if all(going.issuperset(n.users) for n in nodes))
        return tuple(self.program.values[node.name].target for node in alone)

    @cached_property
    def _held(self) -> list[list[Node]]:
        return list(self._used.values())

    @cached_property
    def _place(self) -> dict[Node, int]:
        """For each node of a parameter its place among those of `_held`."""
        return {node: place for place, nodes in enumerate(self._held) for node in nodes}

    def size(self, parameters: Iterable[str]) -> int:
        """The number of elements of the named parameters."""
        return sum(prod(self._shapes[name]) for name in parameters)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {v.target: v.shape for v in self.program.values.values() if v.kind == "parameter"}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self._shapes[name]

    def place(self, found: Candidate) -> str:
        """The module that a branch is: the deepest that holds all its nodes or, where that adds it too, all its layers."""
        own = found.inner & found.gone or found.inner
        whole, added = common_path(map(self.module, own)), self.module(found.join.node)
        return common_path(self.module(n) for n in own if self.works(n)) if is_in(added, whole) else whole


def unique(named: list[tuple[str, str]], taken: Iterable[str]) -> list[str]:
    """A name for each of (place, kind): the place where that is enough, else with the kind, and a number if need be."""
    counts, used, names = Counter(place for place, _ in named), set(taken), list[str]()
    for place, kind in named:
        plain = place and counts[place] == 1 and place not in used
        stem = place if plain else f"{place}:{kind}" if place else kind
        name, k = stem, 1
        while name in used:
            k += 1
            name = f"{stem}-{k}"
        used.add(name)
        names.append(name)
    return names
