"""What must stay: an index of every dim, and, where blocks and branches are left out, an entry of every container, an attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from depgraph.classes import NONE

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


def never_empty(graph: DependencyGraph, scores: dict[str, np.ndarray], names: list[str]) -> dict[str, set[int]]:
    """Groups that stay so that no dim of a parameter loses all its indices to several axes together, by axis.

    Of each dim that the axes `names` could empty, one index stays: that whose lowest place in the order of any is highest.
    """
    place = {n: np.argsort(np.argsort(scores[n], kind="stable")) / graph[n].size for n in names}
    held = [v for v in graph.capture.program.values.values() if v.kind in ("parameter", "buffer")]
    stays: dict[str, set[int]] = {}
    for number in dict.fromkeys(graph.widths.class_of(dim) for value in held for dim in value.dims):
        axes = [graph[n] for n in graph.widths.reaching.get(number, ()) if n in place]
        labels = [axis.labels[number] for axis in axes]
        goes = [(found != NONE) & axis.prunable[found] for axis, found in zip(axes, labels, strict=True)]
        if not axes or not np.logical_or.reduce(goes).all():
            continue
        worth = np.min([np.where(g, place[a.name][x], 1.0) for a, x, g in zip(axes, labels, goes, strict=True)], axis=0)
        best = int(np.argmax(worth))
        for axis, found, going in zip(axes, labels, goes, strict=True):
            if going[best] and (len(axes) > 1 or len(np.unique(found)) < axis.size):
                stays.setdefault(axis.name, set()).add(int(found[best]))
    return stays
