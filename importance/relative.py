"""Losses of outputs as shares, so that axes compare: what our own recipe ranks by (`recipes.best`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from depgraph import Axis, DependencyGraph
from depgraph.errors import ScoreError
from importance.accumulators import Gram, Statistic, Weights
from importance.activation import statistics_of
from importance.calling import check_batches
from importance.choices import pick
from importance.collector import Gathering
from importance.columns import blocks_of, weight_of
from importance.consumers import Consumer
from importance.losses import Loss
from importance.obs import OptimalBrain
from importance.statistics import Statistics
from importance.taylor import Taylor

WEIGHTS = {
    "share": "an axis counts as much as any other: a share of its outputs' energy for a share of its groups",
    "taylor": "an axis counts by what the loss would lose without it to first order, for what its groups cost",
}


@dataclass(frozen=True)
class RelativeLoss:
    """Structured OBS's greedy losses (`OptimalBrain`), as shares of the energy of the consumers' outputs tr(W H W').

    A raw loss of outputs compares within an axis, not across: outputs differ in size, and some matter more. With
    `weight="share"` an axis's shares are multiplied by its number of groups, with "taylor" by the sum of its groups' Taylor
    scores over the cost of one, which takes a backward pass.

    Args:
        data: batches, or `Statistics` with `importance.Gram()` and `importance.Weights("square")`.
        batches: for "taylor", the batches. loss: as `Taylor`'s.
        weight: a name of `WEIGHTS`. rounds, damping: as `OptimalBrain`'s.

    Raises, when called: as `OptimalBrain` and `Taylor` do.
    """

    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[Statistic, ...]] = (Gram(), Weights("square"))

    data: Iterable[Any] | Statistics
    batches: Iterable[Any] = ()
    loss: Loss | None = None
    weight: str = "share"
    rounds: int = 32
    damping: float = 0.01
    gathering: Gathering = field(default_factory=Gathering)

    def __post_init__(self) -> None:
        pick(WEIGHTS, self.weight, "weight of axes")
        if not isinstance(self.data, Statistics):
            check_batches(self.data)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        found = statistics_of(graph, self.data, self.needs, self.gathering)
        losses = OptimalBrain(found, self.damping, self.rounds)(graph)
        energy: dict[str, float] = {}
        for consumer in found.consumers:
            if consumer.key in found.found:
                each = _energy(consumer, found)
                for axis in consumer.labels:
                    energy[axis] = energy.get(axis, 0.0) + each
        weights = self._weights(graph)
        return {a: s / (energy.get(a) or 1.0) * weights[a] for a, s in losses.items()}

    def of_axis(self, axis: Axis, found: Statistics) -> np.ndarray:
        """The losses of one axis [groups], not weighed against those of others."""
        return OptimalBrain(found, self.damping, self.rounds).of_axis(axis, found)

    def _weights(self, graph: DependencyGraph) -> dict[str, float]:
        if self.weight == "share":
            return {axis.name: float(axis.size) for axis in graph.axes}
        if not isinstance(graph.model, nn.Module):
            raise ScoreError(
                f'{type(self).__name__} with weight="taylor" needs gradients, which {graph.name}, an ONNX file, doesn\'t give: give '
                'weight="share", as recipes.best(batches, weight="share") does, or load the PyTorch model'
            )
        totals = Taylor(self.batches, self.loss)(graph)
        dense = graph.dense_cost.params
        costs = {a.name: dense - graph.cost({a.name: [0]}).params if a.size > 1 else dense for a in graph.axes}
        return {a: float(totals[a].sum()) / max(costs[a], 1) for a in totals}


def _energy(consumer: Consumer, found: Statistics) -> float:
    """tr(W H W'): the mean square of what a consumer puts out, summed over its outputs."""
    sums = found.of(consumer, Gram())
    rows = max(sums.rows, 1)
    weight = weight_of(consumer, found)
    if weight is None:
        each = sums.columns // consumer.size
        sizes = found.of(consumer, Weights("square")).value.double().cpu() / each
        return float((sums.diagonal.double().cpu() / rows * sizes.repeat_interleave(each)).sum())
    total = torch.zeros((), dtype=torch.float64)
    for block in blocks_of(consumer, weight, sums.columns):
        matrix = block.matrix.double().cpu()
        total += ((matrix @ (sums.between(block.start, block.stop).double().cpu() / rows)) * matrix).sum()
    return float(total)
