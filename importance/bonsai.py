"""Bonsai (METHODS.md 2.15): what groups are worth, from forward passes of sub-models alone.

Sub-models without some of the groups that a cheap prior holds for the least are run, and their utilities regressed on which
groups they have: the coefficient of a group is what it is worth, whatever it works together with. Needs no gradients, so no
more memory than running the model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.errors import ScoreError, no_batches
from importance.activation import Activation
from importance.calling import check_batches, device_of, inputs_of, loss_after, moved
from importance.choices import pick
from importance.losses import Loss
from importance.perturbing import Candidates, masks, removal, side
from importance.progress import shown
from importance.regression import fitted
from importance.units import KINDS, units

FOLDS = 5
_WORST = 1e8

UTILITIES: dict[str, Callable[[float], float]] = {
    "perplexity": lambda loss: -min(math.exp(min(loss, math.log(_WORST))), _WORST),
    "loss": lambda loss: -min(loss, _WORST),
}
"""Utilities of a sub-model by name, from its mean loss: minus the perplexity exp(loss), at most 1e8, or minus the loss."""


@dataclass(frozen=True)
class Bonsai:
    """Scores of one round: coefficients of candidates, and above them all others by their prior.

    The prior is Wanda-sp's with means: mean |W_ij| times the norm of what comes in, averaged over the channels of a group. Of
    every axis the lowest groups are candidates; a sub-model lacks some of them, half on average, drawn without replacement with
    chances in proportion to (highest prior - prior), and its complement lacks the others. Utilities of all sub-models are regressed
    on all candidates at once. Groups that are no candidates rank above these, by the share of their axis that is lower; then
    axes of other units. So a round is meant to remove about `share`: `importance.recipes.bonsai` takes as many as it needs.

    Deviations: how many candidates of an axis go is drawn for each sub-model. Published, it is about the same number in all, so
    that coefficients compare only within an axis: in the ranking of all, one of two heads was always the first to go, and a
    vision transformer had lost two thirds of its heads, and 79% of 98.9% accuracy left, at 80% of its parameters (97% now, both
    with 40 masks). Ridge regression in closed form for Adam with an L1 or L2 penalty (its strength is chosen likewise, by Kendall's
    tau in five folds); twice int(share * groups) + 1 candidates; axes that can't be filled with zeros exactly are cut instead.

    Args:
        batches: tensors, tuples of arguments or dicts of keyword arguments; run once for each sub-model.
        loss: `loss(output, batch)` -> scalar; None takes the model's own loss, or next-token cross-entropy.
        masks: how many sub-models are drawn; as many complements are run too. 0 gives the prior alone.
        share: of an axis's groups that each sub-model lacks (the paper's p).
        units: a kind of `importance.units.KINDS`: which axes are tried.
        utility: a name of `UTILITIES`.
        seed: of the draws; the same gives the same scores.
        progress: show a bar on stderr.

    Raises ScoreError at once for an option out of range; when called, DataError and ScoreError as `Taylor` does.
    """

    additive: ClassVar[bool] = False

    batches: Iterable[Any]
    loss: Loss | None = None
    masks: int = 200
    share: float = 0.05
    units: str = "units"
    utility: str = "perplexity"
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(KINDS, self.units, "kind of units")
        pick(UTILITIES, self.utility, "utility")
        if not 0 < self.share <= 0.5 or isinstance(self.masks, bool) or self.masks < 0:
            raise ScoreError(
                f"Bonsai has share={self.share!r} and masks={self.masks!r}: give a share above 0 and up to 0.5, and a number of "
                "sub-models, 0 or more"
            )

    @property
    def comparable(self) -> bool:
        """Coefficients compare across axes; the prior, which is all that is left without sub-models, doesn't."""
        return self.masks > 0

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        batches = list(self.batches)
        prior = Activation(batches, "bonsai", reduction="mean")(graph)
        if not self.masks:
            return prior
        found = (Candidates.of(graph, name, prior[name], self.share) for name in units(graph, self.units))
        pool = [one for one in found if len(one.groups)]
        if not pool:
            raise ScoreError(f"no axis of {graph.name} can spare a group to try: give a smaller share")
        generator = np.random.default_rng(self.seed)
        stays = masks(pool, self.masks, generator)
        folds = np.repeat(generator.permutation(self.masks) % min(FOLDS, self.masks), 2)
        utilities = self._utilities(graph, pool, stays, batches)
        return ranked(graph, prior, pool, fitted(stays.astype(np.float64), utilities, folds), units(graph, self.units))

    def _utilities(
        self, graph: DependencyGraph, pool: list[Candidates], stays: np.ndarray, batches: list[Any]
    ) -> np.ndarray:
        """The utility of every sub-model [rows of `stays`]."""
        device = device_of(graph.tensors().values())
        run = Runs(graph, [moved(batch, device) for batch in batches], self.loss)
        utility = pick(UTILITIES, self.utility, "utility")
        with quiet(graph.model):
            dense = run.loss({})
            if not math.isfinite(dense):
                raise ScoreError(
                    f"the loss of the whole model is {dense}: look at its weights, the batches and the loss"
                )
            rows = shown(stays, "running sub-models", self.progress)
            losses = [run.loss(removal(pool, row)) for row in rows]
        return np.array([utility(loss if math.isfinite(loss) else _WORST) for loss in losses])


class Runs:
    """Runs sub-models of a graph's model on batches, one after the other."""

    def __init__(self, graph: DependencyGraph, batches: list[Any], loss: Loss | None) -> None:
        if not batches:
            raise no_batches("to score with")
        self.graph, self.batches, self.of = graph, batches, loss
        self.observer = graph.observer()

    def loss(self, gone: dict[str, np.ndarray]) -> float:
        """The mean over batches of the loss without some groups."""
        model, without = self.graph.model, side(self.graph, gone)
        total = 0.0
        for batch in self.batches:
            output = self.observer.call(inputs_of(model, batch), without)
            total += float(loss_after(model, output, batch, self.of))
        return total / len(self.batches)


def ranked(
    graph: DependencyGraph,
    prior: dict[str, np.ndarray],
    pool: Iterable[Candidates],
    coefficients: np.ndarray,
    tried: Iterable[str],
) -> dict[str, np.ndarray]:
    """Scores of all axes: coefficients of candidates, above them other groups of axes that were tried, then all other axes."""
    top = float(coefficients.max())
    apart = float(np.ptp(coefficients)) or 1.0
    own = frozenset(tried)
    scores = {}
    for axis in graph.axes:
        below = np.argsort(np.argsort(prior[axis.name], kind="stable"), kind="stable") / max(axis.size, 1)
        scores[axis.name] = top + apart * (below + (1 if axis.name in own else 2))
    start = 0
    for one in pool:
        scores[one.axis][one.groups] = coefficients[start : start + len(one.groups)]
        start += len(one.groups)
    return scores
