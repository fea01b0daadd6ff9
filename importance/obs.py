"""Structured optimal brain surgeon: what it costs the consumers that a group goes, once they have made up for it.

The layer problem (METHODS.md 2.13): with H = X'X / rows + damping, removing the columns P of a consumer's weights costs
tr(W_P [(H^-1)_PP]^-1 W_P') when the other columns are changed in the best way, W_K += W_P H_PK H_KK^-1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import Axis, DependencyGraph
from depgraph.errors import ScoreError
from importance.accumulators import Gram, Statistic, Weights
from importance.activation import statistics_of, with_unread
from importance.calling import check_batches
from importance.columns import blocks_of, column_labels, present_groups, weight_of
from importance.normalisation import Normalisation, NormalisationSpec
from importance.statistics import Consumer, Gathering, Statistics


@dataclass
class Problem:
    """One matrix of a consumer: `weight` [outputs, columns] float64, `inverse` of H, and the group of each column."""

    weight: Tensor
    inverse: Tensor
    labels: np.ndarray

    def __post_init__(self) -> None:
        self.columns = {int(g): torch.from_numpy(np.flatnonzero(self.labels == g)) for g in present_groups(self.labels)}

    def losses(self, groups: Collection[int]) -> dict[int, float]:
        """What removing each of `groups` alone would cost now."""
        here = [g for g in self.columns if g in groups]
        if all(len(self.columns[g]) == 1 for g in here) and here:
            at = torch.cat([self.columns[g] for g in here])
            cost = self.weight[:, at].square().sum(dim=0) / self.inverse.diagonal()[at]
            return dict(zip(here, cost.tolist(), strict=True))
        return {g: self._loss(self.columns[g]) for g in here}

    def _loss(self, at: Tensor) -> float:
        weight = self.weight[:, at]
        return float((weight * torch.linalg.solve(self.inverse[at][:, at], weight.T).T).sum())

    def remove(self, groups: Collection[int]) -> None:
        """Take groups out: the weights of the others make up for them, and the inverse is that without them."""
        here = [g for g in self.columns if g in groups]
        if not here:
            return
        at = torch.cat([self.columns.pop(g) for g in here])
        gain = torch.linalg.solve(self.inverse[at][:, at], self.inverse[at])
        self.weight -= self.weight[:, at] @ gain
        self.inverse -= self.inverse[:, at] @ gain
        self.weight[:, at] = 0


@dataclass(frozen=True)
class OptimalBrain:
    """Scores by the loss of removing a group with the optimal update of all consumers that read it, summed over these.

    Losses are of the consumers' outputs, squared, for each position. Several groups of one axis are never as cheap together
    as one by one: with `rounds`, the cheapest share of every axis goes, its consumers' weights and H follow, and the rest is
    scored anew, so that a group's score is what it costs after all that go before it (greedy, as OBS is).

    Args:
        data: batches, or `Statistics` with `importance.Gram()` and `importance.Weights()`.
        damping: added to H's diagonal, as a share of its mean.
        rounds: 1 scores every group alone.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        gathering: precision of the sums, what is zeroed meanwhile, a bar on stderr.

    Raises, when called: DataError and ScoreError as `importance.collect` does; ScoreError for a singular H.
    """

    comparable: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    needs: ClassVar[tuple[Statistic, ...]] = (Gram(), Weights())

    data: Iterable[Any] | Statistics
    damping: float = 0.01
    rounds: int = 1
    normalise: NormalisationSpec = "none"
    gathering: Gathering = field(default_factory=Gathering)

    def __post_init__(self) -> None:
        if not isinstance(self.data, Statistics):
            check_batches(self.data)
        if not 0 <= self.damping < float("inf") or self.rounds < 1:
            raise ScoreError(
                f"damping must be at least 0 and rounds at least 1, they are {self.damping} and {self.rounds}"
            )
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        found = statistics_of(graph, self.data, self.needs, self.gathering)
        read = [axis for axis in graph.axes if found.readers(axis.name)]
        return with_unread(graph, {axis.name: self.of_axis(axis, found) for axis in read})

    def of_axis(self, axis: Axis, found: Statistics) -> np.ndarray:
        """The scores of one axis [groups], from what was found of the consumers that read it."""
        return Normalisation.of(self.normalise)(self._losses(axis.name, axis.size, found))

    def _losses(self, name: str, size: int, found: Statistics) -> np.ndarray:
        """What every group of an axis costs: float64 [groups]."""
        problems = [p for consumer in found.readers(name) for p in self._problems(name, consumer, found)]
        scores, left, spent = np.zeros(size), set(range(size)), 0.0
        share = -(-size // self.rounds)
        while left:
            losses = dict.fromkeys(left, 0.0)
            for problem in problems:
                for group, loss in problem.losses(left).items():
                    losses[group] += loss
            order = sorted(left, key=lambda g: (losses[g], g))
            going = order if self.rounds == 1 else order[:share]
            for group in going:
                scores[group] = losses[group] if self.rounds == 1 else max(losses[group], spent)
            spent = max(spent, max(scores[g] for g in going))
            gone = set(going)
            left -= gone
            for problem in problems if left else ():
                problem.remove(gone)
        return scores

    def _problems(self, axis: str, consumer: Consumer, found: Statistics) -> Iterator[Problem]:
        sums = found.of(consumer, Gram())
        columns = sums.columns
        labels = column_labels(consumer, axis, columns)
        weight = weight_of(consumer, found)
        if weight is None:  # what is multiplied with is computed: only the sizes of its columns are known
            each = columns // consumer.size
            sizes = (found.of(consumer, Weights()).square_sum.double().cpu() / each).sqrt().repeat_interleave(each)
            yield Problem(sizes[None], self._inverse(consumer, sums, 0, columns), labels)
            return
        for block in blocks_of(consumer, weight, columns):
            inverse = self._inverse(consumer, sums, block.start, block.stop)
            yield Problem(block.matrix.double().cpu().clone(), inverse, labels[block.start : block.stop])

    def _inverse(self, consumer: Consumer, sums: Any, start: int, stop: int) -> Tensor:
        return inverse_of(damped(sums.between(start, stop).double().cpu() / max(sums.rows, 1), self.damping), consumer)


def damped(gram: Tensor, damping: float) -> Tensor:
    """H with a share of the mean of its diagonal added to it; columns into which nothing ever came get that alone."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (damping * mean if mean > 0 else 1.0)


def inverse_of(gram: Tensor, where: object) -> Tensor:
    """The inverse of a symmetric matrix; raises ScoreError where it is singular."""
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise ScoreError(
            f"X'X of {where} is singular ({len(gram)} columns that depend on one another): use damping above 0, or more data"
        )
    return torch.cholesky_inverse(factor)
