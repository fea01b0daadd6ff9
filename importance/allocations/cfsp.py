"""CFSP's budget of blocks: a sigmoid of how important each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.allocations.allocated import Arrays, Level, at_levels
from importance.allocations.blocks import Given, PerBlock

PUBLISHED_SLOPE = 128 * 1024 / 1e4
"""The paper's a = 1 for importances that are means over tokens: it sums them over 128 x 1024 and divides by 10,000."""


def weights(importances: Mapping[str, float], slope: float) -> dict[str, float]:
    """The share that each name keeps as a multiple of the average share: a sigmoid of its importance, with mean 1."""
    given = np.array(list(importances.values()))
    raised = 1 / (1 + np.exp(-np.clip(slope * (given - given.mean()), -500, 500)))
    return dict(zip(importances, (raised / raised.mean()).tolist(), strict=True))


def kept_share(weight: float, heaviest: float, sparsity: float) -> float:
    """The share that a block of this weight keeps where blocks lose `sparsity` on average.

    Where the heaviest block would keep more than all, all weights are drawn to their mean 1 until it keeps just all.
    """
    average = 1 - sparsity
    if average * heaviest > 1:
        weight = 1 + (weight - 1) * (1 / average - 1) / (heaviest - 1)
    return average * weight


def _level(weight: float, heaviest: float) -> Level:
    """The inverse of `kept_share`: in proportion to the sparsity until the heaviest block loses anything, then by weight."""
    drawn = 1 - (weight - 1) / (heaviest - 1) if heaviest > 1 else 1.0

    def level(shares: np.ndarray) -> np.ndarray:
        early = shares / drawn if drawn > 0 else np.full(len(shares), np.inf)
        return np.where(early <= 1 - 1 / heaviest, early, 1 - (1 - shares) / weight)

    return level


@dataclass(frozen=True)
class Cfsp:
    """CFSP's coarse allocation (METHODS.md 2.12): block l keeps sigmoid(slope * (B_l - mean B)), scaled to mean 1 - S.

    Where that is more than all of a block, the weights are drawn to their mean until no block keeps more than all (the
    published code draws them 1/1.05 of that way). A constant added to all importances changes nothing, and equal ones give
    the uniform allocation. An axis that lies in no block keeps the average share. The paper prunes neurons only: plan with
    `only=` for that.

    Args:
        importances: of every block or axis, or a function of the graph that finds them; larger keeps more. The paper's is the
            mean over tokens of the angular distance arccos(cos(input, output)) / pi of the block.
        slope: of the sigmoid; the default is the published one for means over tokens.

    Raises ScoreError: `slope` isn't a finite number of 0 or more; when called, for importances that don't fit.
    """

    importances: Given
    slope: float = PUBLISHED_SLOPE

    def __post_init__(self) -> None:
        if not 0 <= self.slope < np.inf:
            raise ScoreError(f"the slope of CFSP is {self.slope!r}: give a finite number, 0 or more")

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        found = PerBlock.of(graph, self.importances, "the importances")
        weight = weights(found.values, self.slope)
        heaviest = max(weight.values())
        return at_levels(graph, scores, lambda axis: _level(found.get(axis, 1.0, weight), heaviest))
