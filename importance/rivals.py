"""Recipes that compete: each is carried out, and that one is taken whose pruned model stays nearest to the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph import DependencyGraph, Plan, Target
from depgraph.capture.capturing import quiet
from depgraph.errors import NothingToPrune, ScoreError, TargetError
from importance.calling import device_of, inputs_of, loss_of_form, moved, run_model
from importance.losses import Loss
from importance.recipe import Pruned, Recipe
from importance.samples import largest_size


@dataclass(frozen=True)
class Rivals(Recipe):
    """A recipe that is the best of `rivals` on its batches: by the mean of `loss` over samples or, without one, by `distance`.

    A loss has one figure for a sample, of which few tell little, and falls where a model learns them by heart; outputs have many.
    Where no outputs can be compared, the model's own loss is taken. Rivals take `units` of this recipe, and its `propagation` if
    that is sequential and they may be, and otherwise each its own settings. One that can't meet the target is left out.
    """

    loss: Loss | None = None
    rivals: tuple[Recipe, ...] = ()

    def plan(self, graph: DependencyGraph, target: Target, **options: Any) -> Plan:
        """The plan of the best; all are carried out to know which that is. Raises as `prune` does."""
        found = self.prune(graph, target, **options).plan
        assert found is not None
        return found

    def prune(self, graph: DependencyGraph, target: Target, **options: Any) -> Pruned:
        """What the best made; raises what the first raises where none can be carried out, and ScoreError without batches."""
        tried: list[tuple[float, int, Pruned]] = []
        refused: list[Exception] = []
        for number, rival in enumerate(self.rivals):
            try:
                done = self._own(rival).prune(graph, target, **options)
            except (NothingToPrune, TargetError) as error:
                refused.append(error)
                continue
            value = self._value(graph.model, done.model)
            tried.append((value if math.isfinite(value) else math.inf, number, done))
        if not tried:
            raise refused[0]
        return min(tried, key=lambda one: one[:2])[2]

    def _value(self, dense: nn.Module, model: nn.Module) -> float:
        apart = distance(dense, model, self.batches or ()) if self.loss is None else None
        return mean_loss(dense, model, self.batches or (), self.loss) if apart is None else apart

    def _own(self, rival: Recipe) -> Recipe:
        own = self.propagation == "dense" or not rival.may_be_sequential
        way = rival.propagation if own else self.propagation
        return replace(rival, units=self.units, propagation=way)


def distance(dense: nn.Module, model: nn.Module, batches: Iterable[Any]) -> float | None:
    """How far the outputs of a form of `dense` are from its own: the squared difference as a share of the squared outputs.

    That is the mean over batches and floating outputs, where these have the same shape; None where none has.
    """
    found: list[float] = []
    device = device_of(model.parameters())
    with quiet(dense), quiet(model), torch.no_grad():
        for batch in batches:
            args, kwargs = inputs_of(dense, moved(batch, device))
            pairs = zip(*(_numbers(run_model(one, args, kwargs)) for one in (dense, model)), strict=False)
            found += [
                float((b - a).square().sum() / a.square().sum()) for a, b in pairs if a.shape == b.shape and a.any()
            ]
    return sum(found) / len(found) if found else None


def _numbers(output: Any) -> list[Tensor]:
    """The floating tensors of an output, on the CPU, with zeros where a mask has made them infinite."""
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return [torch.nan_to_num(t.cpu().float(), nan=math.inf, posinf=0, neginf=0) for t in tensors]


def mean_loss(dense: nn.Module, model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> float:
    """The mean loss over the samples of batches, of a model with the arguments of `dense`; in eval mode, without gradients.

    Raises ScoreError where there is no loss, or there are no batches.
    """
    found = mean_of(model, batches, lambda batch: loss_of_form(dense, model, batch, loss))
    if found is None:
        raise ScoreError("there are no batches to choose between recipes by (a generator gives its batches only once)")
    return found


def mean_of(model: nn.Module, batches: Iterable[Any], figure: Callable[[Any], Any]) -> float | None:
    """The mean of a figure of batches, which come on the model's device, each counted by its samples; None without any."""
    total = count = 0.0
    device = device_of(model.parameters())
    with quiet(model), torch.no_grad():
        for batch in (moved(given, device) for given in batches):
            size = largest_size(batch)
            total += float(figure(batch)) * size
            count += size
    return total / count if count else None
