"""The layer problem of optimal brain surgery: what it costs a consumer that columns of its weights go, and what makes up for them.

With H = X'X / rows + damping (METHODS.md 2.13), removing the columns P costs tr(W_P [(H^-1)_PP]^-1 W_P') when the other columns
are changed in the best way, W_K += W_P H_PK H_KK^-1. How H^-1 is had depends on what came in: as a matrix; from the rows
themselves where these are few (Woodbury); and of columns into which nothing ever came, damping alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from depgraph.errors import ScoreError
from importance.accumulators import GramSums
from importance.columns import Block, present_groups

_LEAST = 1e-4
"""Damping from which on few rows are as good as the matrix, as a share of H's mean diagonal."""


class Solvable(Protocol):
    """A problem that loses groups one after the other."""

    def losses(self, groups: Collection[int]) -> dict[int, float]:
        """What removing each of `groups` alone would cost now; those that have no column here are left out."""

    def remove(self, groups: Collection[int]) -> None:
        """Take groups out: the weights of the others make up for them, and H is that without them."""


@dataclass
class Problem:
    """One matrix of a consumer: `weight` [outputs, columns] float64, `inverse` of H, and the group of each column.

    Removed columns of `weight` are zero; `inverse` has those that are left, in order.
    """

    weight: Tensor
    inverse: Tensor
    labels: np.ndarray

    def __post_init__(self) -> None:
        self.columns = columns_of(self.labels)
        self.left = torch.arange(len(self.inverse))

    def losses(self, groups: Collection[int]) -> dict[int, float]:
        """What removing each of `groups` alone would cost now."""
        found: dict[int, float] = {}
        for here, at in alike(self.columns, groups):
            weight, places = self.weight[:, at].movedim(1, 0), torch.searchsorted(self.left, at)
            if at.shape[1] == 1:
                costs = weight.square().sum(dim=(1, 2)) / self.inverse.diagonal()[places[:, 0]]
            else:
                costs = _costs(weight, self.inverse[places[:, :, None], places[:, None]])
            found |= zip(here, costs.tolist(), strict=True)
        return found

    def remove(self, groups: Collection[int]) -> None:
        """Take groups out: the weights of the others make up for them, and the inverse is that without them."""
        at = pop(self.columns, groups)
        gone = torch.isin(self.left, at)
        if not gone.any():
            return
        kept, lost = self.left[~gone], self.left[gone]
        beside = self.inverse[gone][:, ~gone]
        gain = torch.linalg.solve(self.inverse[gone][:, gone], beside)
        self.weight[:, kept] -= self.weight[:, lost] @ gain
        self.weight[:, lost] = 0
        self.inverse = self.inverse[~gone][:, ~gone].addmm_(beside.T, gain, alpha=-1)
        self.left = kept


@dataclass
class FewRows:
    """A problem with fewer rows than columns: H = rows' rows + damping, `rows` [rows, columns] over the root of their number.

    Removed columns of `weight` are zero; `rows` have those that are left, in order.
    """

    weight: Tensor
    rows: Tensor
    labels: np.ndarray
    damping: float

    def __post_init__(self) -> None:
        self.columns = columns_of(self.labels)
        self.left = torch.arange(len(self.labels))
        self._solve()

    def _solve(self) -> None:
        """With U'U = rows' (damping + rows rows')^-1 rows, H^-1 is (1 - U'U) / damping."""
        inner = self.rows @ self.rows.T
        inner.diagonal().add_(self.damping)
        self.half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), self.rows, upper=False)

    def _inverse(self, half: Tensor) -> Tensor:
        """[(H^-1)_PP] of the columns that some columns [..., rows, columns] of U are of."""
        made: Tensor = half.mT @ half / -self.damping
        made.diagonal(dim1=-2, dim2=-1).add_(1 / self.damping)
        return made

    def losses(self, groups: Collection[int]) -> dict[int, float]:
        """What removing each of `groups` alone would cost now."""
        found: dict[int, float] = {}
        for here, at in alike(self.columns, groups):
            inverse = self._inverse(self.half[:, torch.searchsorted(self.left, at)].movedim(1, 0))
            found |= zip(here, _costs(self.weight[:, at].movedim(1, 0), inverse).tolist(), strict=True)
        return found

    def remove(self, groups: Collection[int]) -> None:
        """Take groups out: the weights of the others make up for them."""
        gone = torch.isin(self.left, pop(self.columns, groups))
        if not gone.any():
            return
        kept, lost, half = self.left[~gone], self.left[gone], self.half[:, gone]
        shares = torch.linalg.solve(self._inverse(half), self.weight[:, lost].T).T
        self.weight[:, kept] += shares @ half.T @ self.half[:, ~gone] / self.damping
        self.weight[:, lost] = 0
        self.rows, self.left = self.rows[:, ~gone], kept
        self._solve()


@dataclass
class Idle:
    """Columns into which nothing ever came: H is damping alone, and what stays can't make up for any of them."""

    weight: Tensor
    labels: np.ndarray
    damping: float

    def __post_init__(self) -> None:
        costs = self.weight.square().sum(dim=0) * self.damping
        self.costs = {group: float(costs[at].sum()) for group, at in columns_of(self.labels).items()}

    def losses(self, groups: Collection[int]) -> dict[int, float]:
        """What removing each of `groups` costs."""
        return {g: self.costs[g] for g in groups if g in self.costs}

    def remove(self, groups: Collection[int]) -> None:
        """Take groups out."""
        for group in groups:
            self.costs.pop(group, None)


def check_greedy(damping: float, rounds: int) -> None:
    """Raise ScoreError for a damping or a number of rounds that is none or out of range."""
    if (
        not isinstance(damping, Real)
        or not 0 <= damping < float("inf")
        or not isinstance(rounds, Integral)
        or rounds < 1
    ):
        raise ScoreError(
            f"damping must be a number of at least 0 and rounds a whole one of at least 1, they are {damping!r} and {rounds!r}"
        )


def greedy_losses(problems: Sequence[Solvable], size: int, rounds: int) -> np.ndarray:
    """What each of `size` groups costs all problems after those that go before it: float64 [groups].

    In each of so many rounds the cheapest of what is left go, and the problems follow. With one round, what each costs alone.
    """
    scores, left, spent = np.zeros(size), set(range(size)), 0.0
    share = -(-size // rounds)
    costs = [problem.losses(left) for problem in problems]
    while left:
        losses = dict.fromkeys(left, 0.0)
        for group, loss in (entry for one in costs for entry in one.items()):
            losses[group] += loss
        order = sorted(left, key=lambda g: (losses[g], g))
        going = order if rounds == 1 else order[:share]
        for group in going:
            scores[group] = losses[group] if rounds == 1 else max(losses[group], spent)
        spent = max(spent, max(scores[g] for g in going))
        gone = set(going)
        left -= gone
        for k, problem in enumerate(problems if left else ()):
            if not gone.isdisjoint(costs[k]):  # what loses nothing costs what it did
                problem.remove(gone)
                costs[k] = problem.losses(left)
    return scores


def problems_of(sums: GramSums, matrix: Block, labels: np.ndarray, damping: float, where: object) -> Iterator[Solvable]:
    """The problem of a matrix of a consumer, of whose columns `labels` says the groups; what is idle in it apart.

    `damping` is a share of the mean of H's diagonal. Raises ScoreError where H is singular.
    """
    start, stop, weight = matrix.start, matrix.stop, matrix.matrix.double().cpu().clone()
    diagonal = sums.diagonal[start:stop].double().cpu() / max(sums.rows, 1)
    added = damping_of(diagonal, damping)
    busy = (diagonal > 0) if added > 0 else torch.ones(len(diagonal), dtype=torch.bool)
    at, named = torch.nonzero(busy).flatten(), labels[busy.numpy()]
    if len(at) < len(busy):
        yield Idle(weight[:, ~busy], labels[~busy.numpy()], added)
    rows = sums.few(start, stop) if damping >= _LEAST else None
    if len(at) and rows is not None:
        scaled = rows[:, at.to(rows.device)].double().cpu() / max(sums.rows, 1) ** 0.5
        yield FewRows(weight[:, at], scaled, named, added)
    elif len(at):
        here = at.to(sums.total.device)
        second = sums.between(start, stop)[here][:, here].double().cpu() / max(sums.rows, 1)
        second.diagonal().add_(added)
        yield Problem(weight[:, at], inverse_of(second, where), named)


def _costs(weight: Tensor, inverse: Tensor) -> Tensor:
    """tr(W_P [(H^-1)_PP]^-1 W_P') of each group: W [groups, outputs, columns], H^-1 [groups, columns, columns] -> [groups]."""
    return (weight * torch.linalg.solve(inverse, weight.mT).mT).sum(dim=(1, 2))


def columns_of(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The columns of every group that labels name."""
    order = np.argsort(labels, kind="stable")
    groups = present_groups(labels)
    starts, stops = (np.searchsorted(labels[order], groups, side) for side in ("left", "right"))
    return {int(g): order[start:stop] for g, start, stop in zip(groups, starts, stops, strict=True)}


def alike(columns: dict[int, np.ndarray], groups: Collection[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Those of `groups` that have columns, by how many: the groups, and their columns [groups, columns]."""
    by_count: dict[int, list[int]] = {}
    for group, at in columns.items():
        if group in groups:
            by_count.setdefault(len(at), []).append(group)
    for here in by_count.values():
        yield here, torch.from_numpy(np.stack([columns[g] for g in here]))


def pop(columns: dict[int, np.ndarray], groups: Collection[int]) -> Tensor:
    """Take groups out of what has the columns of each; gives theirs."""
    gone = [columns.pop(g) for g in [*columns] if g in groups]
    return torch.from_numpy(np.concatenate(gone)) if gone else torch.zeros(0, dtype=torch.long)


def damping_of(diagonal: Tensor, damping: float) -> float:
    """What is added to H's diagonal: a share of its mean; 1 where nothing ever came in."""
    mean = float(diagonal.mean())
    return damping * mean if mean > 0 else 1.0


def damped(gram: Tensor, damping: float) -> Tensor:
    """H with a share of the mean of its diagonal added to it; columns into which nothing ever came get that alone."""
    made = gram.clone()
    made.diagonal().add_(damping_of(gram.diagonal(), damping))
    return made


def inverse_of(gram: Tensor, where: object) -> Tensor:
    """The inverse of a symmetric matrix; raises ScoreError where it is singular."""
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise singular(where, len(gram))
    return torch.cholesky_inverse(factor)


def require_regular(gram: Tensor) -> None:
    """Raise LinAlgError for a symmetric matrix that is singular, or is so but for rounding, of which no solver may take notice."""
    factor, info = torch.linalg.cholesky_ex(gram)
    least = torch.finfo(gram.dtype).eps * len(gram) * gram.diagonal().max()
    if int(info) or not bool((factor.diagonal().square() > least).all()):
        raise torch.linalg.LinAlgError("the matrix is singular")


def singular(where: object, columns: int) -> ScoreError:
    """The error for a matrix that has no inverse; `where` says what comes in."""
    return ScoreError(
        f"X'X of {where} is singular ({columns} columns that depend on one another): use damping above 0, or more data"
    )
