"""What `depgraph` asks of an estimator: one number per group of every axis, the lowest to go first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from depgraph.errors import ScoreError

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Scores = Mapping[str, np.ndarray]


class Scorer(Protocol):
    """Anything that gives each axis, by name, an array [number of groups]: higher is kept longer.

    Two attributes, which a scorer may have, say how a plan spreads its budget unless told otherwise: `comparable` (True if
    absent) whether scores compare across axes, `additive` (False if absent) whether those of several groups add up.
    """

    def __call__(self, graph: DependencyGraph, /) -> Scores: ...


def checked_scores(graph: DependencyGraph, scorer: Scorer | Scores) -> dict[str, np.ndarray]:
    """The scores of all prunable axes as float64 arrays.

    Raises ScoreError when an axis has no scores, too few or too many, or one that is NaN or infinite.
    """
    given = scorer if isinstance(scorer, Mapping) else scorer(graph)
    scores = {}
    for axis in graph.axes:
        if axis.name not in given:
            if axis.prunable.any():
                raise ScoreError(
                    f"no scores for axis {axis.name!r}: a scorer must give every axis an array of its groups"
                )
            continue
        array = np.asarray(given[axis.name], dtype=np.float64)
        if array.shape != (axis.size,):
            raise ScoreError(f"axis {axis.name!r} has {axis.size} groups, but its scores have shape {array.shape}")
        if not np.isfinite(array[axis.prunable]).all():
            bad = int(np.flatnonzero(~np.isfinite(array))[0])
            raise ScoreError(
                f"the score of group {bad} of axis {axis.name!r} is {array[bad]}: "
                "look for NaN or infinite weights, gradients or activations"
            )
        scores[axis.name] = array
    return scores
