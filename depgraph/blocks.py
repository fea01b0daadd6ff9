"""Blocks: entries of a model's containers that take a stream, add branches to it and pass it on."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from depgraph.joins import copies, shape_of
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
        self.refused: dict[str, str] = {}
        found = [block for entry in self._chosen() if (block := self._block(entry)) is not None]
        self._refuse_for_branches()
        found.sort(key=lambda block: self.flow.index[self.named[block.output]])
        self.found = tuple(Block(**{**vars(block), "order": k}) for k, block in enumerate(found))

    @cached_property
    def signatures(self) -> dict[str, tuple[object, ...]]:
        """What each entry is like: its class, and the names and shapes of its parameters."""
        model = self.residual.graph.model
        found = {}
        for path in self.residual.entries:
            module = model.get_submodule(path)
            shapes = ((name, tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False))
            found[path] = (type(module), *shapes)
        return found

    def _chosen(self) -> list[_Entry]:
        """The entries that are blocks, not stages of blocks and not parts of one."""
        entries = {path: entry for path in self.residual.entries if (entry := self._entry(path)).branches}
        inner: dict[str, list[str]] = defaultdict(list)
        for path in entries:
            for outer in entries:
                if path.startswith(f"{outer}."):
                    inner[outer].append(path)
        stages = {path for path in entries if self._is_stage(path, inner[path])}
        tops = [path for path in entries if path not in stages]
        return [entries[path] for path in tops if not any(path in inner[other] for other in tops)]

    def _is_stage(self, path: str, inner: list[str]) -> bool:
        """Does an entry hold entries that are alike, or just one, rather than different parts?"""
        direct = [p for p in inner if not any(p.startswith(f"{other}.") for other in inner)]
        held = Counter((p.rpartition(".")[0], self.signatures[p]) for p in direct)
        return len(direct) == 1 or any(count > 1 for count in held.values())

    def _refuse_for_branches(self) -> None:
        """Say of the entries that hold what looks like a branch and can't go that they can't go either, and why."""
        for name, refusal in zip(self.residual.refused, self.residual.refusals, strict=True):
            places = (self.residual.place(refusal), self.residual.module(refusal.join.node))
            around = [path for path in self.residual.entries if all(_is_in(place, path) for place in places)]
            if around:
                self.refused.setdefault(max(around, key=len), f"{name} can't go: {refusal.why}")

    def _entry(self, path: str) -> _Entry:
        within = {node for node in self.flow.nodes if node.op == "call_function" and _is_in(self.residual.module(node), path)}
        working = {node.name for node in within if self.residual.works(node)}
        works = {b.name: {n for n in b.nodes if self.residual.works(self.named[n])} for b in self.residual.found}
        branches = tuple(b for b in self.residual.found if works[b.name] and works[b.name] <= working)
        for branch in branches:
            within.add(self.flow.top(self.named[branch.add]))
            within.update(self.named[n] for n in (*branch.nodes, branch.add))
        return _Entry(path, branches, frozenset(within))

    def _block(self, entry: _Entry) -> Block | None:
        source = self._source(entry)
        leaving = self._leaving(entry, source) if source is not None else []
        why = self._refusal(entry, source, leaving)
        if why:
            self.refused[entry.path] = why
            return None
        assert source is not None
        (output,) = leaving
        also = {source: {output}}
        gone = self.flow.dead(((node, output) for node in self.flow.read[output]), also) | {output}
        nodes = sorted(gone, key=self.flow.index.__getitem__)
        parameters = self.residual.parameters(gone)
        container, _, key = entry.path.rpartition(".")
        keys = [name for name, _ in self.residual.graph.model.get_submodule(container).named_children()]
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
        first = self.named[entry.branches[0].source]
        if first not in entry.nodes:
            return first
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
        return ""


def _is_in(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")
