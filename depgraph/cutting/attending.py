"""Which modules of a captured model attend to their own stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.residual import Branch


def attending(graph: DependencyGraph) -> set[str]:
    """Paths of the modules in which something of an attention is computed that looks at its own stream alone."""
    nodes = {
        name for b in graph.branches if b.kind == "attention" and not _looks_elsewhere(graph, b) for name in b.nodes
    }
    return {graph.residual.module(node) for node in graph.residual.flow.nodes if node.name in nodes}


def _looks_elsewhere(graph: DependencyGraph, branch: Branch) -> bool:
    """Does a branch multiply its weights with something that isn't computed from its stream?"""
    residual, values = graph.residual, graph.capture.program.values
    named = {node.name: node for node in residual.flow.nodes}
    inner = residual.flow.between(named[branch.source], tuple(named[name] for name in branch.operands))
    own = (named[name] for name in branch.nodes)
    reading = (
        n for n in own if any(values[m.name].target in branch.parameters for m in n.all_input_nodes if m.name in values)
    )
    return any(node not in inner and residual.works(node) for node in reading)
