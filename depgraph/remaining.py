"""What must stay when blocks and branches are left out: an entry of every container, and one of several attentions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def as_blocks(graph: DependencyGraph, names: Iterable[str]) -> list[str]:
    """The names, each once, with a block in the place of all its branches."""
    found = dict.fromkeys(names)
    for block in graph.blocks:
        if block.name not in found and block.branches and all(b in found for b in block.branches):
            found = {n: None for n in found if n not in block.branches} | {block.name: None}
    return list(found)


def why_not(graph: DependencyGraph, names: Iterable[str]) -> str:
    """Why blocks and branches that can go can't go together: a sentence, empty where they can."""
    wanted = as_blocks(graph, names)
    return _no_entry(graph, wanted) or _no_attention(graph, wanted)


def _no_entry(graph: DependencyGraph, names: list[str]) -> str:
    gone = Counter(block.container for block in graph.blocks if block.name in names)
    for container, count in gone.items():
        number = graph.entries_of(container)
        if count >= number:
            return f"the plan removes all {number} entries of {container}: at least one must stay"
    return ""


def _no_attention(graph: DependencyGraph, names: list[str]) -> str:
    inside = {name for block in graph.blocks if block.name in names for name in block.branches}
    attentions = {branch.name for branch in graph.branches if branch.kind == "attention"}
    if len(attentions) < 2 or not attentions <= {*names, *inside}:
        return ""
    gone, flow = graph.left_out(names).nodes, graph.residual.flow
    left = [node for node in flow.nodes if node.name not in gone and node not in flow.unread]
    if graph.residual.kinds.mixes(left):
        return ""
    return f"the plan removes all {len(attentions)} attentions of {graph.name}, so that tokens never meet: at least one must stay"
