"""The axes of a graph, and the dims that they reach, as a bipartite network for networkx and Graphviz."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def network_of(graph: DependencyGraph) -> nx.Graph:
    """Nodes are axes, by name, and parameter dims such as ``fc.weight[0]``; an edge says that the axis reaches the dim."""
    found = nx.Graph()
    for axis in graph.axes:
        prunable = int(axis.prunable.sum())
        found.add_node(axis.name, kind="axis", groups=axis.size, exact=axis.exact, prunable=prunable)
        for member in axis.members:
            node = f"{member.target}[{member.dim}]"
            found.add_node(node, kind=member.kind, size=len(member.labels))
            found.add_edge(axis.name, node)
    return found


def dot_of(graph: DependencyGraph) -> str:
    """The network as Graphviz source."""
    network = network_of(graph)
    lines = ["graph axes {", "  rankdir=LR;"]
    for node, data in network.nodes(data=True):
        shape = "ellipse" if data["kind"] == "axis" else "box"
        lines.append(f'  "{node}" [shape={shape}];')
    lines += [f'  "{a}" -- "{b}";' for a, b in network.edges]
    return "\n".join([*lines, "}"])
