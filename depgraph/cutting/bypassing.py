"""The captured program without some of its branches and blocks, run on the original weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule, Node

from depgraph.cutting.mutating import memory_of
from depgraph.cutting.reference import Reference
from depgraph.cutting.script import Script
from depgraph.cutting.sides import Side
from depgraph.errors import PlanError

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_COPY = torch.ops.aten.clone.default


@dataclass
class Bypassed:
    """A captured program of which parts are left out; `gone` has the names of the nodes that it no longer has."""

    of: DependencyGraph
    graph: Graph
    gone: frozenset[str]

    @property
    def graph_module(self) -> GraphModule:
        """Where constants are held."""
        return self.of.capture.exported.graph_module

    @property
    def graph_signature(self) -> ExportGraphSignature:
        """That of the whole program: the inputs and weights are the same."""
        return self.of.capture.exported.graph_signature

    @property
    def constants(self) -> dict[str, Any]:
        """Those of the whole program."""
        return self.of.capture.exported.constants

    @property
    def state_dict(self) -> dict[str, Any]:
        """That of the whole program."""
        return self.of.capture.exported.state_dict

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors that the program gives, in order, without gradients; `args` and `kwargs` as the model takes them."""
        whole, tensors = self.of.widths.at({}), self.of.tensors()
        reference = Reference(Script(self), self.of.capture.program, [Side(whole, whole)])
        with torch.no_grad():
            (outputs,) = reference.run(
                lambda name: tensors[name] if name in tensors else self.constants[name], args, kwargs
            )
        return [tensor for _, tensor in outputs]


class LeftOut(NamedTuple):
    """What goes with some branches: names of nodes, and of the parameters and buffers that only they read."""

    nodes: frozenset[str]
    parameters: frozenset[str]


def left_out(graph: DependencyGraph, names: Iterable[str]) -> LeftOut:
    """What goes with the branches and blocks of these names; raises PlanError as `bypassed` does."""
    gone = left_of(graph, names).gone
    values, ties = graph.capture.program.values, graph.capture.program.ties
    here: dict[str, bool] = {}
    for node in graph.nodes:
        value = values.get(node.name) if node.op == "placeholder" else None
        if value is not None and value.kind != "input" and value.target:
            root = ties.get(value.target, value.target)
            dead = node.name in gone or (bool(node.users) and all(user.name in gone for user in node.users))
            here[root] = here.get(root, True) and dead
    found = [t for v in values.values() if (t := v.target) and here.get(ties.get(t, t), False)]
    return LeftOut(gone, frozenset(found))


def bypassed(graph: DependencyGraph, names: Iterable[str]) -> Bypassed:
    """The program of `graph` without the branches and blocks of these names, and without what only they read.

    Raises PlanError for a name that is neither, with the reason where it looks like one that can't go.
    """
    left = left_of(graph, names)
    program, made = Graph(), dict[Node, Node]()
    for node in left.nodes:
        if node not in left.instead:
            made[node] = program.node_copy(node, made.__getitem__)
            made[node].name = node.name
        else:
            passed = made[left.instead[node]]
            made[node] = program.call_function(_COPY, (passed,)) if node in left.copied else passed
    return Bypassed(graph, program, left.gone)


@dataclass(frozen=True)
class Left:
    """What is left of a captured graph: `nodes` in order. What `instead` names goes on in place of some of them.

    That is the same memory, but for `copied`, where it must be a copy. `gone` are the names of what is no longer computed.
    """

    nodes: tuple[Node, ...]
    instead: Mapping[Node, Node]
    copied: frozenset[Node]
    gone: frozenset[str]


def left_of(graph: DependencyGraph, names: Iterable[str]) -> Left:
    """What is left of the captured graph without the branches and blocks of these names; raises as `bypassed` does."""
    branches = {branch.name: branch for branch in graph.branches}
    blocks = {block.name: block for block in graph.blocks}
    passing = _Passing(graph)
    for name in dict.fromkeys(names):
        if name in branches:
            passing.leave_out(branches[name].add, branches[name].operands)
        elif name in blocks:
            passing.go_past(blocks[name].output, blocks[name].input)
        else:
            why = graph.branches_refused.get(name, "the model has no such branch or block, see its branches and blocks")
            raise PlanError(f"{name!r} can't be left out: {why}")
    return passing.left()


class _Passing:
    """A captured graph, which operands of its additions are left out, and what goes on in place of which node."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.of = graph
        self.flow = graph.residual.flow
        self.named = {node.name: node for node in self.flow.nodes}
        self.parted: set[tuple[Node, Node]] = set()
        self.past: dict[Node, Node] = {}
        self.instead: dict[Node, Node] = {}
        self.nothing: set[Node] = set()

    def leave_out(self, add: str, operands: Iterable[str]) -> None:
        """Let the other operand of an addition go on alone."""
        self.parted |= {(self.named[name], self.named[add]) for name in operands}

    def go_past(self, output: str, source: str) -> None:
        """Let `source` go on in place of `output`."""
        self.past[self.named[output]] = self.named[source]

    def left(self) -> Left:
        """The graph without what is left out."""
        for node in self.flow.nodes:
            self._settle(node)
        also: dict[Node, set[Node]] = {}
        for output, source in self.past.items():
            also.setdefault(source, set()).add(output)
        gone = self.flow.dead(self._unread(), also)
        nodes = tuple(node for node in self.flow.nodes if node not in gone and node not in self.flow.unread)
        copied = frozenset(node for node in nodes if node in self.instead and self._written_to(node, gone))
        return Left(nodes, self.instead, copied, frozenset(node.name for node in (*gone, *self.instead)))

    def _settle(self, node: Node) -> None:
        """Find out whether another node goes on in place of `node`, or nothing does."""
        if node in self.past:
            self.instead[node] = self.past[node]
            return
        given = node.all_input_nodes
        left = [n for n in given if n not in self.nothing and (n, node) not in self.parted]
        if len(left) == len(given):
            return
        if left:
            self.instead[node] = left[0]
        else:
            self.nothing.add(node)

    def _unread(self) -> Iterable[tuple[Node, Node]]:
        """Pairs of a node and what no longer reads it."""
        yield from self.parted
        yield from ((node, reader) for node in self.nothing for reader in self.flow.readers[node])
        yield from ((node, output) for output in self.past for node in self.flow.read[output])
        for node, instead in self.instead.items():
            yield from self.flow.passed(node, instead)

    def _written_to(self, node: Node, gone: set[Node]) -> bool:
        """Is what `node` made, or what goes on in its place, written to later, where these had memory of their own?"""
        ends = {memory_of(node), memory_of(self.instead[node])}
        later = (
            w for w in self.flow.writes if w.writer not in gone and self.flow.index[w.writer] > self.flow.index[node]
        )
        return len(ends) > 1 and any(write.root in ends for write in later)
