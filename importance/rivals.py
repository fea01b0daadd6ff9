"""Recipes that compete: each is carried out, and that one is taken whose pruned model has the lowest loss on the batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from depgraph import DependencyGraph, Plan, Target
from depgraph.capture.capturing import quiet
from depgraph.errors import NothingToPrune, ScoreError, TargetError
from importance.calling import loss_of_form, moved
from importance.losses import Loss
from importance.recipe import Pruned, Recipe
from importance.samples import largest_size


@dataclass(frozen=True)
class Rivals(Recipe):
    """A recipe that is the best of `rivals` on its batches, by the mean of `loss` (None: the model's own) over samples.

    They take `units` of this one, and its `propagation` if that is sequential, and otherwise each its own settings. One that
    can't meet the target is left out.
    """

    loss: Loss | None = None
    rivals: tuple[Recipe, ...] = ()

    def plan(self, graph: DependencyGraph, target: Target, **options: Any) -> Plan:
        """The plan of the best; all are carried out to know which that is. Raises as `prune` does."""
        found = self.prune(graph, target, **options).plan
        assert found is not None
        return found

    def prune(self, graph: DependencyGraph, target: Target, **options: Any) -> Pruned:
        """What the best made; raises what the first raises where none can be carried out, and ScoreError without a loss."""
        tried: list[tuple[float, int, Pruned]] = []
        refused: list[Exception] = []
        for number, rival in enumerate(self.rivals):
            try:
                done = self._own(rival).prune(graph, target, **options)
            except (NothingToPrune, TargetError) as error:
                refused.append(error)
                continue
            value = mean_loss(graph.model, done.model, self.batches or (), self.loss)
            tried.append((value if math.isfinite(value) else math.inf, number, done))
        if not tried:
            raise refused[0]
        return min(tried, key=lambda one: one[:2])[2]

    def _own(self, rival: Recipe) -> Recipe:
        way = rival.propagation if self.propagation == "dense" else self.propagation
        return replace(rival, units=self.units, propagation=way)


def mean_loss(dense: nn.Module, model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> float:
    """The mean loss over the samples of batches, of a model with the arguments of `dense`; in eval mode, without gradients.

    Raises ScoreError where there is no loss, or there are no batches.
    """
    total = count = 0.0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with quiet(model), torch.no_grad():
        for batch in (moved(given, device) for given in batches):
            size = largest_size(batch)
            total += float(loss_of_form(dense, model, batch, loss)) * size
            count += size
    if not count:
        raise ScoreError("there are no batches to choose between recipes by (a generator gives its batches only once)")
    return total / count
