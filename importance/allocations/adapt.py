"""Adapt-Pruner: step by step, blocks that change little lose more than others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from depgraph import Axis, DependencyGraph
from depgraph.errors import ScoreError
from importance.allocations.allocated import Arrays, Level, at_levels, in_proportion
from importance.allocations.blocks import Given, PerBlock
from importance.earlier import first_size

MOST = 0.99


def centred(importances: Mapping[str, float]) -> dict[str, float]:
    """Importances with mean 0, divided by the largest of their sizes: from -1 to 1; zeros where all are equal."""
    given = np.array(list(importances.values()))
    shifted = given - given.mean()
    largest = np.abs(shifted).max()
    within = shifted / largest if largest > 1e-12 * np.abs(given).max() else np.zeros(len(given))
    return dict(zip(importances, within.tolist(), strict=True))


def stepped(
    before: Mapping[str, float], importances: Mapping[str, float], step: float, amplitude: float
) -> dict[str, float]:
    """The sparsities after one step: more by step - amplitude * importance (`centred`), within 0 and 0.99."""
    given = centred(importances)
    return {name: float(np.clip(before[name] + step - amplitude * given[name], 0, MOST)) for name in given}


@dataclass(frozen=True)
class AdaptPruner:
    """Adapt-Pruner (METHODS.md 2.16): in each step block l loses step - amplitude * I_l of what its axes had at first.

    I_l is the importance of the block, centred and scaled to [-1, 1]: the mean of what blocks lose is the step. Meant for an
    iterative `importance.Schedule`, where importances are found anew in each step (give a function for that) and
    widths before the first cut are known from the model's record; in one shot, the blocks lose in that proportion. A block that
    would lose nothing or less, or is down to 0.01 of its width, loses only when all others are through. An axis that lies in no
    block loses the step. The plan finds how much of a step meets the target exactly.

    Args:
        importances: of every block or axis, or a function of the graph that finds them; the larger, the less is lost. The
            paper's is minus the mean over tokens of the cosine of input and output of the block. (The code negates its other
            metrics, euclidean and manhattan distance, as well, which turns the allocation round.)
        step: what blocks lose on average in a step.
        amplitude: the paper's A: 0.03 in the code, 0.02 in its scripts.

    Raises ScoreError: `step` isn't above 0 or `amplitude` negative; when called, for importances that don't fit.
    """

    importances: Given
    step: float = 0.05
    amplitude: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.step < 1 or not 0 <= self.amplitude < np.inf:
            raise ScoreError(
                f"Adapt-Pruner has step={self.step!r} and amplitude={self.amplitude!r}: give a share between 0 and 1, "
                "and a finite number of 0 or more"
            )

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        found = PerBlock.of(graph, self.importances, "the importances")
        given = centred(found.values)
        sizes = {axis.name: first_size(graph, axis) for axis in graph.axes}

        def level(axis: Axis) -> Level:
            pace = 1 - self.amplitude / self.step * found.get(axis, 0.0, given)
            gone = 1 - axis.size / sizes[axis.name]
            return lambda shares: np.where(gone + shares > MOST, np.inf, in_proportion(pace)(shares))

        return at_levels(graph, scores, level, sizes)
