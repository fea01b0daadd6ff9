"""Can the module form make a cut, all told: sizes, numbers computed from sizes, and tensors that aren't the module's own?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from depgraph.cutting.absorbing import can_absorb
from depgraph.cutting.module import narrowed, plain_tensor
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def is_expressible(graph: DependencyGraph, kept: Kept) -> bool:
    """Whether the module's own Python computes this cut, as far as can be told without making it."""
    kept = kept.of_dims()
    solution = graph.sizes.solve(kept)
    if solution.conflicts or not can_absorb(graph, solution.drifts):
        return False
    held = graph.held()
    return all(v.target in held or plain_tensor(graph, v) is not None for v in narrowed(kept))
