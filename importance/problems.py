"""The layer problem of optimal brain surgery: what it costs a consumer that columns of its weights go, and what makes up for them.

With H = X'X / rows + damping (METHODS.md 2.13), removing the columns P costs tr(W_P [(H^-1)_PP]^-1 W_P') when the other columns
are changed in the best way, W_K += W_P H_PK H_KK^-1. Of H^-1 only what belongs to columns that may go is needed, and how that is
had depends on what came in, see `importance.inverses`.
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
from importance.columns import present_groups


class Solvable(Protocol):
    """A problem that loses groups one after the other."""

    def losses(self, groups: Collection[int]) -> dict[int, float]:
        """What removing each of `groups` alone would cost now; those that have no column here are left out."""

    def remove(self, groups: Collection[int]) -> None:
        """Take groups out: the weights of the others make up for them, and H is that without them."""


class _Columns:
    """One matrix of a consumer, `weight` [outputs, columns] in float64, and the group of each column.

    What is held is of the columns that are left, in order; those without a group are left in any case.
    """

    def __init__(self, weight: Tensor, labels: np.ndarray) -> None:
        self.labels = labels
        self.rows = weight.T.contiguous()
        self.columns = columns_of(labels)
        self.left = torch.arange(len(labels))

    @property
    def weight(self) -> Tensor:
        """The weights as they have become [outputs, columns], zero where columns went."""
        found = self.rows.new_zeros(len(self.labels), self.rows.shape[1])
        found[self.left] = self.rows
        return found.T

    def losses(self, groups: Collection[int]) -> dict[int, float]:
        """What removing each of `groups` alone would cost now."""
        found: dict[int, float] = {}
        for here, at in alike(self.columns, groups):
            places = torch.searchsorted(self.left, at)
            found |= zip(here, _costs(self.rows[places], self._within(places)).tolist(), strict=True)
        return found

    def remove(self, groups: Collection[int]) -> None:
        """Take groups out: the weights of the others make up for them, and H^-1 is that without them."""
        gone = torch.isin(self.left, pop(self.columns, groups))
        if gone.any():
            lost, kept = torch.nonzero(gone).flatten(), torch.nonzero(~gone).flatten()
            self._make_up(lost, kept)
            self.left = self.left[kept]

    def _within(self, places: Tensor) -> Tensor:
        """[(H^-1)_PP] of each group: its columns [groups, columns] -> [groups, columns, columns]."""
        raise NotImplementedError

    def _make_up(self, lost: Tensor, kept: Tensor) -> None:
        """W_K -= (H^-1)_KP [(H^-1)_PP]^-1 W_P, and (H^-1)_KK -= (H^-1)_KP [(H^-1)_PP]^-1 (H^-1)_PK."""
        raise NotImplementedError


class Problem(_Columns):
    """A problem whose `inverse` of H [columns, columns] is given."""

    def __init__(self, weight: Tensor, inverse: Tensor, labels: np.ndarray) -> None:
        super().__init__(weight, labels)
        self.inverse = inverse

    def _within(self, places: Tensor) -> Tensor:
        if places.shape[1] == 1:
            return self.inverse.diagonal()[places, None]
        return self.inverse[places[:, :, None], places[:, None]]

    def _make_up(self, lost: Tensor, kept: Tensor) -> None:
        rows = self.inverse.index_select(0, lost)
        factor = _factor(rows.index_select(1, lost))
        beside = torch.linalg.solve_triangular(factor, rows.index_select(1, kept), upper=False)
        own = torch.linalg.solve_triangular(factor, self.rows.index_select(0, lost), upper=False)
        self.rows = self.rows.index_select(0, kept).addmm_(beside.T, own, alpha=-1)
        self.inverse = self.inverse.index_select(0, kept).index_select(1, kept).addmm_(beside.T, beside, alpha=-1)


class FewRows(_Columns):
    """A problem with fewer rows than columns: H^-1 is (1 - U U') / damping, with `half` U [columns, rows]."""

    def __init__(self, weight: Tensor, half: Tensor, labels: np.ndarray, damping: float) -> None:
        super().__init__(weight, labels)
        self.half, self.damping = half, damping

    def _within(self, places: Tensor) -> Tensor:
        half = self.half[places]
        made: Tensor = half @ half.mT / -self.damping
        made.diagonal(dim1=1, dim2=2).add_(1 / self.damping)
        return made

    def _make_up(self, lost: Tensor, kept: Tensor) -> None:
        """The same; the new U is U_K L'^-1, with L L' = 1 - U_P' U_P."""
        half, gone = self.half.index_select(0, kept), self.half.index_select(0, lost)
        shares = torch.cholesky_solve(self.rows.index_select(0, lost), _factor(self._within(lost[None])[0]))
        self.rows = self.rows.index_select(0, kept).addmm_(half, gone.T @ shares, alpha=1 / self.damping)
        inner = torch.eye(half.shape[1], dtype=half.dtype).addmm_(gone.T, gone, alpha=-1)
        self.half = torch.linalg.solve_triangular(_factor(inner).T, half, upper=True, left=False)


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


def _costs(weight: Tensor, inverse: Tensor) -> Tensor:
    """tr(W_P' [(H^-1)_PP]^-1 W_P) of each group: W [groups, columns, outputs], H^-1 [groups, columns, columns] -> [groups]."""
    if weight.shape[1] == 1:
        return weight.square().sum(dim=(1, 2)) / inverse[:, 0, 0]
    return torch.linalg.solve_triangular(_factor(inverse), weight, upper=False).square().sum(dim=(1, 2))


def _factor(matrix: Tensor) -> Tensor:
    """Lower triangular L with L L' = `matrix` [..., n, n], also where rounding has made that indefinite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    least = torch.finfo(matrix.dtype).eps * values.amax(dim=-1, keepdim=True).abs()
    return torch.linalg.qr((vectors * values.clamp(min=least).sqrt()[..., None, :]).mT, mode="r").R.mT


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
