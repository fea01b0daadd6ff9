"""LAMP: each group beside those of its axis that are at least as large."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depgraph import DependencyGraph
from importance.allocations.allocated import Arrays, not_negative, placed, scored


def lamp(ascending: np.ndarray) -> np.ndarray:
    """u_k / (u_k + u_(k+1) + ... + u_n) for values u, ascending and not negative; 1 for the last, 0 where all left are 0."""
    rest = np.cumsum(ascending[::-1])[::-1]
    found = np.divide(ascending, rest, out=np.zeros_like(ascending), where=rest > 0)
    found[-1:] = 1.0
    return found


@dataclass(frozen=True)
class Lamp:
    """LAMP scores (METHODS.md 2.4) across the groups of each axis, in one pool: the largest of an axis scores 1.

    Meant for squared magnitudes, such as `importance.Magnitude(normalise="none")`. Groups of one score rank by position,
    so that all but the last of them go earlier than LAMP alone would say.

    Raises ScoreError when called with negative scores.
    """

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        return {
            axis.name: placed(axis, order, lamp(not_negative(axis, given, "LAMP")))
            for axis, order, given in scored(graph, scores)
        }
