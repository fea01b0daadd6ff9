"""How much the loss suffers when one axis alone loses some of its groups: which parts of a model can spare most.

The captured program is run with the groups filled with zeros (cut, where an operator looks at the whole axis at once), so
that nothing is pruned on the way and the model stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depgraph import Axis, DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.errors import NothingToPrune, ScoreError
from depgraph.patterns import Matcher
from depgraph.scoring import Scorer, Scores, checked_scores
from depgraph.story.parts import Curve, Sensitivity
from importance.bonsai import Runs
from importance.calling import check_batches, device_of, moved
from importance.losses import Loss
from importance.magnitude import Magnitude


@dataclass(frozen=True)
class Probing:
    """What is tried.

    scorer: says which groups go first, an estimator or its scores by axis. shares: of an axis's groups, each above 0 and below
    1; of those that may go at least one does and one stays. axes: patterns as `graph.plan` takes in `only`; none for all.
    most: how many axes are tried, spread evenly over those of the model; None for all.
    """

    scorer: Scorer | Scores = field(default_factory=Magnitude)
    shares: tuple[float, ...] = (0.125, 0.25, 0.5)
    axes: tuple[str, ...] = ()
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise ScoreError(f"shares={self.shares!r}: give shares of an axis to take away, each above 0 and below 1")
        if self.most is not None and self.most < 1:
            raise ScoreError(f"most={self.most!r}: give a number of axes to try, 1 or more, or None for all")


def sensitivity(
    graph: DependencyGraph, batches: Iterable[Any], loss: Loss | None = None, probing: Probing | None = None
) -> Sensitivity:
    """The change of the mean loss when each axis alone loses the lowest scored of its groups, at several shares.

    Costs a forward pass over all batches for every axis and share. A change that isn't finite is None.

    Args:
        batches: tensors, tuples of arguments or dicts of keyword arguments.
        loss: `loss(output, batch)` -> scalar; None takes the model's own loss, or next-token cross-entropy.

    Raises:
        NothingToPrune: no axis (of those that `probing` names) may lose a group.
        DataError: there are no batches, or they don't fit the model.
        ScoreError: there is no loss, it isn't finite on the whole model, or the scores don't fit the axes.
    """
    check_batches(batches)
    how = Probing() if probing is None else probing
    axes = _tried(graph, how)
    scores = checked_scores(graph, how.scorer)
    device = device_of(graph.tensors().values())
    run = Runs(graph, [moved(batch, device) for batch in batches], loss)
    with quiet(graph.model):
        dense = run.loss({})
        if not math.isfinite(dense):
            raise ScoreError(f"the loss of the whole model is {dense}: look at its weights, the batches and the loss")
        curves = tuple(_curve(run, axis, scores[axis.name], (dense, how.shares)) for axis in axes)
    return Sensitivity(dense, len(run.batches), curves)


def _tried(graph: DependencyGraph, how: Probing) -> list[Axis]:
    asked = Matcher(how.axes)
    axes = [axis for axis in graph.axes if _most(graph, axis) > 0 and (not how.axes or asked(axis))]
    if not axes:
        raise NothingToPrune(f"{graph.name} has no axis to try that could lose a group: see graph.show()")
    if how.most is None or how.most >= len(axes):
        return axes
    return [axes[k] for k in np.linspace(0, len(axes) - 1, how.most).round().astype(int)]


def _most(graph: DependencyGraph, axis: Axis) -> int:
    """How many groups of an axis may go at most."""
    return min(int(axis.prunable.sum()), axis.size - graph.widths.least(axis.name))


def _curve(run: Runs, axis: Axis, scores: np.ndarray, at: tuple[float, tuple[float, ...]]) -> Curve:
    """The curve of one axis; `at` is the whole model's loss, and the shares to try."""
    dense, shares = at
    free = np.flatnonzero(axis.prunable)
    order = free[np.argsort(scores[free], kind="stable")]
    step, most = run.graph.widths.step(axis.name), _most(run.graph, axis)
    counts: dict[int, float | None] = {}
    for share in sorted(shares):
        count = min(max(round(share * axis.size), 1), most)
        count -= (count - axis.size) % step
        if count > 0 and count not in counts:
            change = run.loss({axis.name: order[:count]}) - dense
            counts[count] = change if math.isfinite(change) else None
    return Curve(axis.name, tuple(count / axis.size for count in counts), tuple(counts.values()))
