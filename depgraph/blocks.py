"""Blocks: entries of a model's containers that take a stream, add branches to it and pass it on."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from depgraph.joins import copies, shape_of
from depgraph.paths import common_path, is_in
from depgraph.residual import Branch, Branches


@dataclass(frozen=True)
class Block:
    """An entry of a container, which the stream can go past: `output` has the shape of `input`.

    `name` is the path of the module, `container` and `index` say where it is held. `branches` are the names of those within
    it, `nodes` those of the graph's nodes that go with it; `parameters`, `params` and `macs` are as in `residual.Branch`.
    """

    name: str
    container: str
    index: int
    branches: tuple[str, ...]
    nodes: tuple[str, ...]
    input: str
    output: str
    parameters: tuple[str, ...]
    params: int
    macs: int
    order: int


@dataclass(frozen=True)
class _Entry:
    """An entry with branches in it, and the nodes that it computes."""

    path: str
    branches: tuple[Branch, ...]
    nodes: frozenset[Node]


class Blocks:
    """The blocks of a graph: `found`, in order of execution, and by name why other entries can't go (`refused`)."""

    def __init__(self, residual: Branches) -> None:
        self.residual = residual
        self.flow = residual.flow
        self.named = {node.name: node for node in self.flow.nodes}
        self.entries = {path: entry for path in residual.holders if (entry := self._entry(path)).branches}
        parts = [self._blocks(path) for path in self._within("")]
        found = [block for blocks, _ in parts for block in blocks]
        self.refused = {name: why for _, reasons in parts for name, why in reasons.items()}
        self._refuse_for_branches()
        found.sort(key=lambda block: self.flow.index[self.named[block.output]])
        self.found = tuple(Block(**{**vars(block), "order": k}) for k, block in enumerate(found))

    @cached_property
    def signatures(self) -> dict[str, tuple[object, ...]]:
        """What each entry is like: its class, and the names and shapes of its parameters."""
        return {path: self.residual.graph.likeness(path) for path in self.residual.entries}

    def _within(self, outer: str) -> list[str]:
        """Entries with branches that lie in another (in the model, if that is empty), but in none between."""
        inner = [path for path in self.entries if path != outer and is_in(path, outer)]
        return [path for path in inner if not any(path != other and is_in(path, other) for other in inner)]

    def _blocks(self, path: str) -> tuple[list[Block], dict[str, str]]:
        """The block that an entry is, or those in it where it is a stage; and why others in it are none."""
        inner = self._within(path)
        parts = [self._blocks(p) for p in inner]
        within = [block for blocks, _ in parts for block in blocks]
        refused = {name: why for _, reasons in parts for name, why in reasons.items()}
        stage = self._is_stage(path, inner)
        if stage and all(blocks for blocks, _ in parts):
            return within, refused
        entry = self.entries[path]
        source = self._source(entry)
        leaving = [] if source is None else self._leaving(entry, source)
        why = self._refusal(entry, source, leaving)
        if not why and source is not None:
            return [self._block(entry, source, leaving[0])], {}
        return (within, refused) if inner and (stage or len(leaving) < 2) else ([], {path: why})

    def _is_stage(self, path: str, inner: list[str]) -> bool:
        """Does an entry hold entries that are alike, or one with all that it has, rather than different parts?"""
        held = Counter((p.rpartition(".")[0], self.signatures[p]) for p in inner)
        alone = len(inner) == 1 and self.entries[inner[0]].branches == self.entries[path].branches
        return alone or any(count > 1 for count in held.values())

    def _refuse_for_branches(self) -> None:
        """Say of the entries that hold what looks like a branch and can't go that they can't go either, and why."""
        for name, refusal in zip(self.residual.refused, self.residual.refusals, strict=True):
            place, add = self.residual.place(refusal), self.residual.module(refusal.join.node)
            holding = (path for path in self.residual.holders if is_in(place, path))
            around = [path for path in holding if path in self.refused or is_in(add, path)]
            path = max(around, key=len, default="")
            if path in self.refused or path and path not in self.entries:
                self.refused[path] = f"{name} can't go: {refusal.why}"

    def _entry(self, path: str) -> _Entry:
        branches = tuple(b for b in self.residual.found if is_in(self._places[b.name], path))
        within = {node for module, nodes in self._computed.items() if is_in(module, path) for node in nodes}
        for branch in branches:
            within.update(self.named[n] for n in (*branch.nodes, branch.add))
            within.add(self.flow.top(self.named[branch.add]))
        return _Entry(path, branches, frozenset(within))

    @cached_property
    def _places(self) -> dict[str, str]:
        """The deepest module that all that a branch computes with lies in."""
        found = {}
        for branch in self.residual.found:
            nodes = (self.named[name] for name in branch.nodes)
            found[branch.name] = common_path(self.residual.module(node) for node in nodes if self.residual.works(node))
        return found

    @cached_property
    def _computed(self) -> dict[str, list[Node]]:
        """The nodes that each module computes itself."""
        found: dict[str, list[Node]] = defaultdict(list)
        for node in self.flow.nodes:
            if node.op == "call_function":
                found[self.residual.module(node)].append(node)
        return found

    def _block(self, entry: _Entry, source: Node, output: Node) -> Block:
        gone = self._gone(source, output)
        nodes = sorted(gone, key=self.flow.index.__getitem__)
        parameters = self.residual.parameters(gone)
        container, _, key = entry.path.rpartition(".")
        keys = [name for path in self.residual.entries for at, _, name in [path.rpartition(".")] if at == container]
        return Block(
            entry.path,
            container,
            keys.index(key),
            tuple(b.name for b in entry.branches),
            tuple(node.name for node in nodes),
            source.name,
            output.name,
            parameters,
            self.residual.size(parameters),
            self.residual.macs(gone),
            0,
        )

    def _source(self, entry: _Entry) -> Node | None:
        """The stream that enters: where the first branch starts, or the only value of its shape from outside."""
        sources = [self.named[branch.source] for branch in entry.branches]
        first = next((node for node in sources if node not in entry.nodes), None)
        if first is not None:
            return first
        first = sources[0]
        outside = {self.flow.original(n) for node in entry.nodes for n in node.all_input_nodes}
        outside = {n for n in outside if n in self.flow.moving and n not in entry.nodes}
        alike = [n for n in outside if shape_of(n) == shape_of(first) and self.flow.between(n, (first,))]
        return alike[0] if len(alike) == 1 else None

    def _leaving(self, entry: _Entry, source: Node) -> list[Node]:
        """What is read outside of what an entry computes from its stream."""
        inside = self.flow.between(source, tuple(entry.nodes)) & entry.nodes
        found = dict[Node, None]()
        for node in sorted(inside, key=self.flow.index.__getitem__):
            if any(user not in entry.nodes and user not in self.flow.unread for user in node.users):
                while copies(node) and node.all_input_nodes[0] in inside:
                    node = node.all_input_nodes[0]
                if not copies(node) or self.flow.original(node) is not source:
                    found[node] = None
        return list(found)

    def _refusal(self, entry: _Entry, source: Node | None, leaving: list[Node]) -> str:
        if source is None:
            return "what enters it isn't one stream of the shape that leaves it"
        if len(leaving) != 1:
            names = ", ".join(node.name for node in leaving) or "nothing"
            return f"more than its stream leaves it: {names}" if leaving else "nothing that it computes is read"
        if shape_of(leaving[0]) != shape_of(source):
            return f"its input has shape {shape_of(source)}, its output {shape_of(leaving[0])}"
        gone = self._gone(source, leaving[0])
        kept = (n for n in self.flow.nodes if n in entry.nodes and n not in gone and n not in self.flow.unread)
        stays = list(filter(self.residual.works, kept))
        return f"{stays[0].name}, inside it, isn't computed from the stream that leaves it" if stays else ""

    def _gone(self, source: Node, output: Node) -> set[Node]:
        """The nodes that go where `source` goes on in place of `output`."""
        parted = {(node, output) for node in self.flow.read[output]} | set(self.flow.passed(output, source))
        return self.flow.dead(parted, {source: {output}}) | {output}
