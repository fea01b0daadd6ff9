"""Ways to part with blocks: whole, so that their lists are shorter, or branch by branch where others need what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from depgraph.cutting.bypassing import left_out
from depgraph.paths import is_in
from depgraph.remaining import as_blocks

if TYPE_CHECKING:
    from depgraph.blocks import Block
    from depgraph.dependency import DependencyGraph


def ways(graph: DependencyGraph, names: Iterable[str]) -> Iterator[list[str]]:
    """Blocks and branches that leave the same out as those of these names do, the likeliest first.

    A block leaves its list, also where all its branches are named. Where others read something that it computes, or its list
    can't be shorter, its branches make way instead, if nothing else of it would go.
    """
    wanted = as_blocks(graph, names)
    gone = left_out(graph, wanted).nodes
    first = _parted(graph, wanted, lambda block: read_by_others(graph, block, gone) != "")
    yield first
    if (others := _parted(graph, wanted, lambda block: True)) != first:
        yield others


def _parted(graph: DependencyGraph, wanted: list[str], which: Callable[[Block], bool]) -> list[str]:
    """The names with the branches of some blocks in their place, where without these the same is computed."""
    blocks, found = {block.name: block for block in graph.blocks}, list[str]()
    for name in wanted:
        block = blocks.get(name)
        apart = block is not None and which(block) and _computed(graph, block.branches) == _computed(graph, [name])
        found += block.branches if block is not None and apart else [name]
    return found


def _computed(graph: DependencyGraph, names: Iterable[str]) -> set[str]:
    """What goes with these but copies."""
    gone, residual = left_out(graph, names).nodes, graph.residual
    return {node.name for node in residual.flow.nodes if node.name in gone and not residual.idle(node)}


def read_by_others(graph: DependencyGraph, block: Block, gone: frozenset[str]) -> str:
    """What a block computes and others read where these nodes go, as a sentence; empty where there is nothing."""
    for node in graph.residual.flow.nodes:
        inside = node.op == "call_function" and is_in(graph.residual.module(node), block.name)
        if inside and node.name not in gone and node.name != block.output and not graph.residual.idle(node):
            return f"{block.name} can't be left out of {type(graph.model).__name__}: {node.name}, which it computes, is read by others"
    return ""
