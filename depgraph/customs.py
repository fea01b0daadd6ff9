"""Sizes of a model's inputs and outputs that hold its widths: what to say of them where something can't be met for that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from depgraph.report import uncovered
from depgraph.widths import stored_values
from depgraph.wording import counted

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

FIRST = "output 0"  # keeps its width by rule, which needs no words
_LITTLE = 0.1  # of the parameters: below that, what is held isn't why a target can't be met


def customs_that_hold(graph: DependencyGraph) -> dict[str, str]:
    """Which inputs and outputs but the first output hold the widths of much of the parameters: a clause for each, by its name."""
    sizes = {value.target: math.prod(value.shape) for value in stored_values(graph.capture.program)}
    held: dict[str, dict[str, int]] = {}
    for left in uncovered(graph):
        if left.lift and left.lift != FIRST:
            held.setdefault(left.lift, {})[left.target] = left.size
    least = _LITTLE * max(graph.dense_cost.params, 1)
    return {
        lift: f"{lift} holds the width of {_named(widths)}, as it has that size itself"
        for lift, widths in held.items()
        if sum(sizes[name] for name in widths) >= least
    }


def _named(widths: dict[str, int]) -> str:
    first, size = next(iter(widths.items()))
    more = f" and {counted(len(widths) - 1, 'other', 'others')}" if len(widths) > 1 else ""
    return f"{first!r}{more} ({size})"
