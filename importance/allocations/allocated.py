"""An allocation spreads the budget over the axes by changing scores, so that one ranking of all groups realises it.

The order of the groups within an axis stays; what changes is how the axes compare. `graph.plan` then searches the beginning
of that ranking that meets the target in exact cost, with ties, rounding and floors, so an allocation counts nothing itself.
Most allocations give *levels*: the budget p, a share of groups gone overall, at which an axis has lost its k-th group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from depgraph import Axis, DependencyGraph
from depgraph.errors import ScoreError
from depgraph.scoring import Scorer, Scores, checked_scores

Arrays = Mapping[str, np.ndarray]
"""Scores by axis name, float64 [groups]."""

Allocation = Callable[[DependencyGraph, Arrays], dict[str, np.ndarray]]
"""Maps scores of all axes to scores of the same form that compare across axes, and keeps the order within each axis.

What a group that can't go scores doesn't matter."""

Level = Callable[[np.ndarray], np.ndarray]
"""Maps shares of an axis that are gone, in (0, 1] and ascending, to the levels at which they are."""


@dataclass(frozen=True)
class Allocated:
    """The scores of `scorer` (an estimator, or scores by axis), spread by `allocation`: a scorer in its own right.

    Raises ScoreError when called for what is no scorer or no allocation, and what either raises.
    """

    comparable: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    scorer: Scorer | Scores
    allocation: Allocation

    def __post_init__(self) -> None:
        if not callable(self.allocation) or isinstance(self.allocation, type):
            raise ScoreError(
                f"{self.allocation!r} is no allocation: pass one such as importance.allocations.Uniform(), "
                "or importance.allocations.named('uniform')"
            )

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        return self.allocation(graph, checked_scores(graph, self.scorer))


def ascending(axis: Axis, scores: np.ndarray) -> np.ndarray:
    """The groups of an axis that may go, lowest score first, equal ones by position: the order in which a plan takes them."""
    free = np.flatnonzero(axis.prunable)
    return free[np.argsort(scores[free], kind="stable")]


def placed(axis: Axis, order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Scores [groups] of an axis: `values` at the groups `order`, infinite for groups that can't go."""
    found = np.full(axis.size, np.inf)
    found[order] = values
    return found


def scored(graph: DependencyGraph, scores: Arrays) -> list[tuple[Axis, np.ndarray, np.ndarray]]:
    """Every axis that has scores and may lose a group, the groups it may lose in their order, and their scores."""
    axes = [axis for axis in graph.axes if axis.name in scores and axis.prunable.any()]
    orders = [ascending(axis, scores[axis.name]) for axis in axes]
    return [(axis, order, scores[axis.name][order]) for axis, order in zip(axes, orders, strict=True)]


def at_levels(
    graph: DependencyGraph, scores: Arrays, level: Callable[[Axis], Level], sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Scores that are levels: those of each axis at the shares 1/size, 2/size, ... of its groups.

    `sizes` are the numbers of groups that shares refer to, those of the axes by default. A share that an axis doesn't reach
    has an infinite level: such groups go after all others, by their shares.
    """
    found, last = {}, 0.0
    for axis, order, _ in scored(graph, scores):
        shares = (np.arange(len(order)) + 1) / (sizes or {}).get(axis.name, axis.size)
        found[axis.name] = axis, order, shares, level(axis)(shares)
        last = max(last, float(found[axis.name][3].max(initial=0.0, where=np.isfinite(found[axis.name][3]))))
    return {
        name: placed(axis, order, np.where(np.isfinite(levels), levels, last + 1 + shares))
        for name, (axis, order, shares, levels) in found.items()
    }


def in_proportion(pace: float) -> Level:
    """An axis that loses `pace` times the level; one that has none loses nothing before all others are through."""
    return lambda shares: shares / pace if pace > 0 else np.full(len(shares), np.inf)


def not_negative(axis: Axis, scores: np.ndarray, what: str) -> np.ndarray:
    """The scores of one axis; raises ScoreError where one is negative."""
    if (scores < 0).any():
        raise ScoreError(
            f"{what} needs scores of at least zero, axis {axis.name!r} has {scores.min():g}: don't standardise before"
        )
    return scores
