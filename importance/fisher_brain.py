"""Optimal brain surgery in the units of the loss: outputs of a consumer count by the curvature that the loss has there.

`OptimalBrain` counts all outputs alike. With G the second moment of the gradients of what a consumer puts out (its factor of the
empirical Fisher, as in `Surgeon`), removing the columns C of its weights costs 1/2 tr(W_C' G W_C [(A^-1)_CC]^-1), which is the
layer problem of `importance.problems` for any R W with R'R = G. Losses of different consumers are then of one kind, so that axes
compare. Greedy as OBS is: Hassibi and Stork 1993; with Kronecker factors: Wang et al. 2019 (EigenDamage), van der Ouderaa et al.
2024 (LLM Surgeon).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.classes import NONE
from importance.activation import with_unread
from importance.calling import check_batches
from importance.factors import FactorSums, Side
from importance.gradients import require_module
from importance.kronecker import Backward, Kronecker, prunable
from importance.layout import Place
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.problems import Problem, check_greedy, greedy_losses, inverse_of
from importance.products import Product


@dataclass(frozen=True)
class FisherBrain:
    """Scores by what the loss loses with a group once all that reads it has made up for that, after all groups that go before it.

    A group costs what its columns cost; an axis without any (what two activations are multiplied over) what its rows cost. One
    forward and backward pass for each batch; A and G are of the positions that the loss depends on, summed over a sample, see
    `Surgeon`. Axes that reach no linear map or convolution (not transposed) go last, by the size of their weights.

    Args:
        batches: an iterable of tensors, tuples (arguments) or dicts (keyword arguments).
        loss: `loss(output, batch)` -> scalar, a mean over samples; None takes the model's own loss, or next-token
            cross-entropy.
        damping: added to the diagonals of A and G, as a share of their means.
        rounds: in how many the groups of an axis go; 1 scores every group alone.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        progress: show a bar on stderr.

    Raises, when called: DataError and ScoreError as `Taylor`; ScoreError for a singular A.
    """

    comparable: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    gradients: ClassVar[bool] = True

    batches: Iterable[Any]
    loss: Loss | None = None
    damping: float = 0.01
    rounds: int = 32
    normalise: NormalisationSpec = "none"
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        check_greedy(self.damping, self.rounds)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_module(graph, type(self).__name__)
        layout = prunable(graph)
        if not layout.parameters:
            return with_unread(graph, {})
        gathered = Kronecker.of(graph, layout, Backward(self.batches, self.loss, self.progress), _ProblemSums)
        normalisation = Normalisation.of(self.normalise)
        columns = {axis: self._greedy(axis, gathered) for axis in gathered.read}
        rows = {
            axis: scores
            for axis in layout.places.keys() - columns
            if (scores := self._rows(axis, gathered)) is not None
        }
        return with_unread(graph, {axis: normalisation(scores) for axis, scores in {**columns, **rows}.items()})

    def _greedy(self, axis: str, gathered: Kronecker) -> np.ndarray:
        problems = [
            problem
            for name, place, sums in _uses(axis, gathered)
            if place.dim == sums.columns
            for problem in sums.problems(place, self.damping, name, gathered.positions(sums))
        ]
        return greedy_losses(problems, gathered.layout.sizes[axis], self.rounds)

    def _rows(self, axis: str, gathered: Kronecker) -> np.ndarray | None:
        """The sum of what a group's rows cost, alone; None where there are no rows."""
        size, costs = gathered.layout.sizes[axis], []
        for name, place, sums in _uses(axis, gathered):
            (cost,) = sums.costs(self.damping, name, [(place, size)])
            costs.append(cost.numpy() * gathered.positions(sums))
        return np.sum(costs, axis=0) if costs else None


def _uses(axis: str, gathered: Kronecker) -> Iterator[tuple[str, Place, _ProblemSums]]:
    """The weights that an axis reaches, where, and their factors."""
    for place in gathered.layout.places[axis]:
        for turned in (False, True):
            sums = gathered.factors.get((place.parameter, turned))
            if isinstance(sums, _ProblemSums):
                yield place.parameter, place, sums


class _ProblemSums(FactorSums):
    """Sums from which a problem can be made that goes on as columns go: G where it is the smaller one, else W'GW."""

    def __init__(self, product: Product, places: Sequence[Place]) -> None:
        super().__init__(product, places)
        self.several = self.several | {self.columns}
        if self.matrix.shape[1] <= self.matrix.shape[2]:
            self.dims = self.dims | {self.outputs}
        self.read = [place for place in places if place.dim == self.columns]
        self.waiting: dict[int, list[_Part]] = {}

    def problems(self, place: Place, damping: float, name: str, positions: float) -> list[Problem]:
        """The layer problem of each block for a place of columns, in units of the loss at all `positions` of a sample.

        Those of all places are made at once, and each waits until it is asked for.
        """
        if id(place) not in self.waiting:
            size = (positions / 2) ** 0.5 / (self.scale or 1.0)
            sides = self.sides(place.dim, self.means(name), damping, name)
            made = [(_rooted(one) * size, inverse_of(one.curvature, one.where)) for one in sides]
            self.waiting = {id(p): list(map(_part, made, self.labels(p))) for p in self.read}
        return [Problem(*part) for part in self.waiting.pop(id(place))]


_Part = tuple[Tensor, Tensor, np.ndarray]
"""What a `Problem` is made of."""


def _part(whole: tuple[Tensor, Tensor], labels: np.ndarray) -> _Part:
    """What belongs to the columns that have a group among `labels`: a removal of others changes nothing else."""
    named = torch.from_numpy(labels != NONE)
    if named.all():
        return (*whole, labels)
    at = torch.nonzero(named).flatten()
    weight, inverse = whole
    return weight[:, at], inverse.index_select(0, at).index_select(1, at), labels[named.numpy()]


def _rooted(side: Side) -> Tensor:
    """R W of a matrix W' whose rows are columns of W: R'R = G, or R W itself from the sum W'GW."""
    if side.summed:
        return _root(side.energy)
    return _root(side.energy) @ side.matrix.mT


def _root(matrix: Tensor) -> Tensor:
    """Some R with R'R the matrix, which is symmetric and has no negative eigenvalue but for rounding."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not int(info):
        return factor.mT
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()).mT
