"""H^-1 of what comes into one matrix of a consumer: made once, for all axes that the consumer reads.

It is had as a matrix; from the rows themselves where these are few (Woodbury); and of columns into which nothing ever came, H is
damping alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from depgraph.classes import NONE
from importance.accumulators import FEW, Gram, GramSums, Weights
from importance.columns import Block, blocks_of, column_labels, weight_of
from importance.consumers import Consumer, Key
from importance.problems import FewRows, Idle, Problem, Solvable, damping_of, inverse_of
from importance.statistics import Statistics

_LEAST = 1e-4
"""Damping from which on few rows are as good as the matrix, as a share of H's mean diagonal."""


@dataclass(frozen=True)
class Inverse:
    """H^-1 over the columns `at` of a matrix; into the columns `idle` nothing comes.

    One of `whole` [at, at] and `half` [at, rows], see `FewRows`.
    """

    at: Tensor
    idle: Tensor
    damping: float
    whole: Tensor | None = None
    half: Tensor | None = None

    def over(self, labels: np.ndarray) -> Inverse:
        """The same over the columns that have a group among `labels`."""
        named = torch.from_numpy(labels != NONE)
        if named.all():
            return self
        here = torch.nonzero(named[self.at]).flatten()
        whole = None if self.whole is None else self.whole.index_select(0, here).index_select(1, here)
        half = None if self.half is None else self.half.index_select(0, here)
        return replace(self, at=self.at[here], idle=self.idle[named[self.idle]], whole=whole, half=half)

    def problems(self, matrix: Tensor, labels: np.ndarray) -> Iterator[Solvable]:
        """The problem of `matrix` [outputs, columns], of whose columns `labels` says the groups; what is idle in it apart."""
        weight, mine = matrix.double().cpu(), self.over(labels)
        if len(mine.idle):
            yield Idle(weight[:, mine.idle], labels[mine.idle.numpy()], mine.damping)
        weight, named = weight[:, mine.at], labels[mine.at.numpy()]
        if not len(named):
            return
        if mine.half is not None and mine.half.shape[1] * FEW <= len(named):
            yield FewRows(weight, mine.half, named, mine.damping)
        else:
            yield Problem(weight, mine.matrix, named)

    @property
    def matrix(self) -> Tensor:
        """H^-1 [at, at]."""
        if self.whole is not None:
            return self.whole
        assert self.half is not None
        made = torch.eye(len(self.half), dtype=self.half.dtype).addmm_(self.half, self.half.T, alpha=-1)
        return made.div_(self.damping)


def inverse_for(sums: GramSums, start: int, stop: int, damping: float, where: object) -> Inverse:
    """H^-1 of the columns [start, stop); `damping` is a share of the mean of H's diagonal.

    Raises ScoreError where H is singular.
    """
    diagonal = sums.diagonal[start:stop].double().cpu() / max(sums.rows, 1)
    added = damping_of(diagonal, damping)
    busy = (diagonal > 0) if added > 0 else torch.ones(len(diagonal), dtype=torch.bool)
    found = Inverse(torch.nonzero(busy).flatten(), torch.nonzero(~busy).flatten(), added)
    rows = sums.few(start, stop) if damping >= _LEAST else None
    if not len(found.at):
        return found
    if rows is not None:
        scaled = rows[:, found.at.to(rows.device)].double().cpu() / max(sums.rows, 1) ** 0.5
        return replace(found, half=_half(scaled, added))
    here = found.at.to(sums.total.device)
    second = sums.between(start, stop)[here][:, here].double().cpu() / max(sums.rows, 1)
    second.diagonal().add_(added)
    return replace(found, whole=inverse_of(second, where))


def _half(rows: Tensor, damping: float) -> Tensor:
    """U [columns, rows] with U U' = rows' (damping + rows rows')^-1 rows."""
    inner = rows @ rows.T
    inner.diagonal().add_(damping)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(inner), rows, upper=False).T.contiguous()


@dataclass
class Inverses:
    """The problems of consumers, once for each of `axes`.

    Where several axes meet in a consumer (what a concatenation joins), H^-1 is made for the first, and for each other only
    what belongs to its columns is kept until it is asked for.
    """

    found: Statistics
    damping: float
    axes: Collection[str]
    waiting: dict[tuple[Key, int, str], Inverse] = field(default_factory=dict)

    def problems(self, axis: str, consumer: Consumer) -> Iterator[Solvable]:
        """The problems of a consumer in which groups of `axis` go; raises ScoreError where H is singular."""
        sums = self.found.of(consumer, Gram())
        labels = column_labels(consumer, axis, sums.columns)
        for block in self._blocks(consumer, sums.columns):
            inverse = self._of(axis, consumer, block)
            yield from inverse.problems(block.matrix, labels[block.start : block.stop])

    def _blocks(self, consumer: Consumer, columns: int) -> list[Block]:
        weight = weight_of(consumer, self.found)
        if weight is not None:
            return [*blocks_of(consumer, weight, columns)]
        each = columns // consumer.size  # what is multiplied with is computed: only the sizes of its columns are known
        sizes = self.found.of(consumer, Weights("square")).value.double().cpu() / each
        return [Block(sizes.sqrt().repeat_interleave(each)[None], 0)]

    def _of(self, axis: str, consumer: Consumer, block: Block) -> Inverse:
        mine = (consumer.key, block.start, axis)
        if mine in self.waiting:
            return self.waiting.pop(mine)
        sums = self.found.of(consumer, Gram())
        made = inverse_for(sums, block.start, block.stop, self.damping, consumer)
        for other in (consumer.labels.keys() & self.axes) - {axis}:
            labels = column_labels(consumer, other, sums.columns)[block.start : block.stop]
            self.waiting[consumer.key, block.start, other] = made.over(labels)
        return made
