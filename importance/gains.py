"""How what stays predicts what goes: (S_KK + damping)^-1 S_KG, with S the second moments of columns.

S comes as a matrix, or as few rows A with S = A'A, where A_K' (damping + A_K A_K')^-1 A_G is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from importance.problems import damped, damping_of, require_regular


class Spread(Protocol):
    """Second moments of columns."""

    def gain(self, kept: Tensor, gone: Tensor, damping: float) -> Tensor:
        """[kept, gone]; `damping` is a share of the mean of the diagonal of what is kept. Raises LinAlgError where that is singular."""


@dataclass(frozen=True)
class Matrix:
    """Second moments [columns, columns]."""

    moments: Tensor

    def gain(self, kept: Tensor, gone: Tensor, damping: float) -> Tensor:
        """Columns into which nothing comes predict nothing, nor are they predicted; without damping all are solved for."""
        diagonal = self.moments.diagonal()
        added = damping_of(diagonal[kept], damping)
        if not added > 0:
            second = damped(self.moments[kept][:, kept], damping)
            require_regular(second)
            return torch.linalg.solve(second, self.moments[kept][:, gone])
        found = self.moments.new_zeros(len(kept), len(gone))
        at, to = (torch.nonzero(diagonal[which]).flatten() for which in (kept, gone))
        held, asked = kept[at], gone[to]
        second = self.moments[held][:, held]
        second.diagonal().add_(added)
        found[at[:, None], to] = _solved(second, self.moments[held][:, asked])
        return found


@dataclass(frozen=True)
class Few:
    """Rows [rows, columns] that the second moments are the products of."""

    rows: Tensor

    def gain(self, kept: Tensor, gone: Tensor, damping: float) -> Tensor:
        """The same, from a system of as many equations as there are rows."""
        left = self.rows[:, kept]
        added = damping_of(left.square().sum(dim=0), damping)
        if not added > 0:
            return Matrix(self.rows.T @ self.rows).gain(kept, gone, damping)
        inner = left @ left.T
        inner.diagonal().add_(added)
        return left.T @ _solved(inner, self.rows[:, gone])


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution for a symmetric matrix, also where rounding has made it indefinite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.solve(matrix, right) if int(info) else torch.cholesky_solve(right, factor)
