"""What `depgraph` asks of an estimator: one number per group of every axis, or per block or branch, the lowest to go first."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from depgraph.errors import ScoreError

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Scores = Mapping[str, np.ndarray]


class Scorer(Protocol):
    """Anything that gives each axis, by name, an array [number of groups]: higher is kept longer.

    Attributes, which a scorer may have, say how a plan spreads its budget unless told otherwise: `comparable` (True if
    absent) whether scores compare across axes, `additive` (False if absent) whether those of several groups add up, and `unit`
    ("" if absent) what they are changes of, so that those of groups and of branches compare where it is the same.
    """

    def __call__(self, graph: DependencyGraph, /) -> Scores: ...


class DepthScorer(Protocol):
    """Gives blocks or branches, by name, a number: the lowest is to go first; what it doesn't name must stay.

    An attribute `unit` says what scores are changes of, as for a `Scorer`.
    """

    def __call__(self, graph: DependencyGraph, /) -> Mapping[str, float]: ...


class Found(Protocol):
    """What a search found: `names` of the blocks or branches that go."""

    @property
    def names(self) -> tuple[str, ...]: ...


class DepthSearch(Protocol):
    """Finds which `count` blocks or branches of a graph go.

    An attribute `nested` (False if absent) says that what is found for fewer is the beginning of what is found for more.
    """

    def __call__(self, graph: DependencyGraph, count: int, /) -> Found: ...


Depth = DepthScorer | DepthSearch | Mapping[str, float]


def require_graph(given: Any) -> None:
    """Raise ScoreError where something else stands in the place of a graph."""
    if not hasattr(given, "axes"):
        raise ScoreError(
            f"expected a graph and got a {type(given).__name__}: trace the model first, graph = depgraph.trace(model, inputs)"
        )


def is_search(depth: Depth) -> bool:
    """Does it say which so many go, rather than give each a number?"""
    if isinstance(depth, Mapping):
        return False
    if not callable(depth) or isinstance(depth, type):
        raise ScoreError(
            f"{depth!r} scores no blocks or branches: pass numbers by name, or one of importance.depth, such as Sleb(batches)"
        )
    needed = [p for p in inspect.signature(depth).parameters.values() if p.default is p.empty]
    return len(needed) > 1


def checked_depth(graph: DependencyGraph, depth: Depth) -> dict[str, float]:
    """The scores of blocks or branches by name.

    Raises ScoreError where there are none, one is of what can't be left out, or is NaN, infinite or no real number.
    """
    if not graph.branches:
        raise ScoreError(_no_branches(graph))
    given = depth if isinstance(depth, Mapping) else depth(graph)  # type: ignore[call-arg]
    if not isinstance(given, Mapping):
        raise ScoreError(
            f"{type(depth).__name__} gave a {type(given).__name__}: it must return a dict of name to number"
        )
    known = {b.name for b in graph.branches} | {b.name for b in graph.blocks}
    for name, score in given.items():
        if name not in known:
            raise ScoreError(f"{name!r} has a score, but the model has no such branch or block that can be left out")
        if not isinstance(score, Real) or not math.isfinite(score):
            raise ScoreError(f"the score of {name!r} is {score!r}: it must be a finite number")
    return {name: float(score) for name, score in given.items()}


def _no_branches(graph: DependencyGraph) -> str:
    name, why = next(iter(graph.branches_refused.items()), ("", ""))
    reason = f"{name} can't go, {why}" if name else "no addition joins a stream with what was computed from it"
    return f"{graph.name} has no branches or blocks that could be left out: {reason}"


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
