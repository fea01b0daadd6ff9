"""What `depgraph` asks of an estimator: one number per group of every axis, the lowest to go first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

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

    Raises ScoreError when a weight of the model is NaN or infinite, when `scorer` is none or gives no scores by axis, and
    when an axis has no scores, too few or too many, or one that is NaN, infinite or no real number.
    """
    graph.require_finite(ScoreError)
    given = _given(graph, scorer)
    scores = {}
    for axis in graph.axes:
        if axis.name not in given:
            if axis.prunable.any():
                raise ScoreError(
                    f"no scores for axis {axis.name!r}: a scorer must give every axis an array of its groups"
                )
            continue
        array = _numbers(axis.name, given[axis.name])
        if array.shape != (axis.size,):
            raise ScoreError(
                f"axis {axis.name!r} has {axis.size} groups, but its scores have shape {array.shape}: give one per group"
            )
        if not np.isfinite(array[axis.prunable]).all():
            bad = int(np.flatnonzero(~np.isfinite(array) & axis.prunable)[0])
            raise ScoreError(
                f"the score of group {bad} of axis {axis.name!r} is {array[bad]}: "
                "look for NaN or infinite weights, gradients or activations"
            )
        scores[axis.name] = array
    return scores


def _given(graph: DependencyGraph, scorer: Scorer | Scores) -> Scores:
    """The scores by axis, whichever way they were given."""
    if isinstance(scorer, Mapping):
        return scorer
    if isinstance(scorer, str):
        raise ScoreError(
            f"{scorer!r} is a name, not a scorer: pass importance.named({scorer!r}) or importance.Magnitude()"
        )
    if not callable(scorer) or isinstance(scorer, type):
        raise ScoreError(f"{scorer!r} is not a scorer: pass one such as importance.Magnitude(), or scores by axis name")
    found = scorer(graph)
    if not isinstance(found, Mapping):
        name = getattr(scorer, "__name__", type(scorer).__name__)
        raise ScoreError(
            f"the scorer {name} gave a {type(found).__name__}: it must return a dict of axis name to array"
        )
    return found


def _numbers(name: str, given: Any) -> np.ndarray:
    """Scores of one axis as float64."""
    try:
        array = np.asarray(given.detach().cpu().double() if isinstance(given, torch.Tensor) else given)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"they are {array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ScoreError(
            f"the scores of axis {name!r} aren't an array of real numbers ({error}): give one per group"
        ) from error
