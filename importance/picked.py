"""Rows that a model picks by what its weights make of them (a router's choices), which may be others once it is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from depgraph import DependencyGraph
from depgraph.capture.asking import all_asked
from depgraph.graph import Program
from depgraph.origins import picks
from importance.consumers import Consumer


def of_picked_rows(graph: DependencyGraph, consumers: Sequence[Consumer]) -> list[Consumer]:
    """Those of `consumers` into which rows come that another model with the same inputs may pick otherwise."""
    program = graph.capture.program
    find, dims = program.relations.find, _picked(graph)

    def meets(consumer: Consumer) -> bool:
        operands = ((program.values[m.operand], m.dim) for m in consumer.meetings)
        rows = (find(dim) for value, along in operands for dim in value.dims if dim != value.dim(along))
        return not dims.isdisjoint(rows)

    return [consumer for consumer in consumers if meets(consumer)] if dims else []


def _picked(graph: DependencyGraph) -> frozenset[int]:
    """The dims, as representatives of their classes, along which something is picked by what weights say."""
    nodes = [node for node in graph.nodes if isinstance(node, Node)]
    program = graph.capture.program
    made = dict(picks((n for n in nodes if n.op == "call_function"), program))
    if not made:
        return frozenset()
    kinds = {n.name: program.values[n.name].kind for n in nodes if n.name in program.values}
    answers = {asked.gives: asked.node for asked in all_asked(graph.capture.exported) if asked.gives}
    weighed = _reached(nodes, {name for name, kind in kinds.items() if kind == "parameter"}, answers)
    moving = _reached(nodes, {name for name, kind in kinds.items() if kind == "input"}, {})
    found: set[int] = set()
    for node, dims in made.items():
        source, *others = node.all_input_nodes
        if source.name in moving and any(other.name in weighed for other in others):
            found |= dims
    return _laid_out(program, found)


def _reached(nodes: list[Node], start: set[str], answers: Mapping[str, str]) -> set[str]:
    """The names of what is computed from `start`, by way of answers (constants by name, and what was asked for them) too."""
    found, before = set(start), -1
    while len(found) > before:
        before = len(found)
        found |= {given for given, asked in answers.items() if asked in found}
        for node in nodes:
            if not found.isdisjoint(n.name for n in node.all_input_nodes):
                found.add(node.name)
    return found


def _laid_out(program: Program, dims: set[int]) -> frozenset[int]:
    """These dims, and those that were laid out of them and others."""
    find, before = program.relations.find, -1
    while len(dims) > before:
        before = len(dims)
        dims |= {find(f.flat) for f in program.relations.folds if not dims.isdisjoint(map(find, f.parts))}
    return frozenset(dims)
