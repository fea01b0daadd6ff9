"""The least squares fit of a matrix to what a wider one puts out, and its damping, chosen by rows that it isn't fitted to.

min ||W x + b - V z - c||^2 + damping ||V - now||^2 over V and, where there is a bias, c. A quarter of the rows is kept back
where there are several dampings to choose from: with few rows for many columns, a fit with little damping learns these by heart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depgraph.errors import no_batches
from importance.problems import damped, require_regular

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""To choose from: from a hundredth of the mean second moment of what comes in to three times that."""
_BACK = 4  # of so many rows, one is kept back


@dataclass(frozen=True)
class Sums:
    """Over rows, on the CPU in float64: their number, sums of the wide inputs x and the narrow ones z, x'z and z'z."""

    rows: int
    x: Tensor
    z: Tensor
    xz: Tensor
    zz: Tensor

    @classmethod
    def of(cls, x: Tensor, z: Tensor) -> Sums:
        """Of rows [rows, columns], wide and narrow."""
        made = (x.sum(0), z.sum(0), x.T @ z, z.T @ z)
        return cls(len(x), *(tensor.double().cpu() for tensor in made))

    def plus(self, other: Sums) -> Sums:
        """Sums over the rows of both."""
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def about(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Second moments of x with z, and of z, about these points."""
        mean_x, mean_z = self.x / self.rows, self.z / self.rows
        xz = self.xz / self.rows - torch.outer(mean_x, z) - torch.outer(x, mean_z) + torch.outer(x, z)
        zz = self.zz / self.rows - torch.outer(mean_z, z) - torch.outer(z, mean_z) + torch.outer(z, z)
        return xz, zz


@dataclass(frozen=True)
class Parted:
    """Sums over the rows to fit to, and over those that are kept back, None where there are none."""

    fit: Sums
    back: Sums | None = None

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]], *, parted: bool) -> Parted:
        """Of batches of rows, wide and narrow: the last quarter of each is kept back where it is `parted`."""
        fit: Sums | None = None
        back: Sums | None = None
        for x, z in pairs:
            at = len(x) - (len(x) // _BACK if parted else 0)
            fit = _plus(fit, Sums.of(x[:at], z[:at]))
            back = _plus(back, Sums.of(x[at:], z[at:])) if at < len(x) else back
        if fit is None:
            raise no_batches("to fit with")
        return cls(fit, back)

    @property
    def all(self) -> Sums:
        """Over all rows."""
        return self.fit if self.back is None else self.fit.plus(self.back)


def _plus(sums: Sums | None, more: Sums) -> Sums:
    return more if sums is None else sums.plus(more)


@dataclass(frozen=True)
class Fit:
    """What is fitted: W `wanted` [outputs, x's columns], V held near `now` [outputs, z's columns]; `centred`: a bias takes means."""

    wanted: Tensor
    now: Tensor
    centred: bool

    def solved(self, sums: Sums, damping: float) -> Tensor:
        """V; `damping` is a share of the mean of z's second moments. Raises LinAlgError where these are singular."""
        xz, zz = sums.about(*self._centre(sums))
        ridge = damped(zz, damping)
        if not damping:
            require_regular(ridge)
        return torch.linalg.solve(ridge, (self.wanted @ xz + self.now @ (ridge - zz)).T).T

    def error(self, matrix: Tensor, fitted: Sums, sums: Sums) -> float:
        """By how much the mean square of what V, fitted to some rows, leaves on others is above that of V = 0."""
        xz, zz = sums.about(*self._centre(fitted))
        return float(((matrix @ zz - 2 * self.wanted @ xz) * matrix).sum())

    def damping(self, parted: Parted, dampings: Sequence[float]) -> float:
        """That of `dampings` with the least error on what is kept back; the first where nothing is."""
        back = parted.back
        if back is None or len(dampings) == 1:
            return dampings[0]
        return min(dampings, key=lambda one: self.error(self.solved(parted.fit, one), parted.fit, back))

    def _centre(self, sums: Sums) -> tuple[Tensor, Tensor]:
        if not self.centred:
            return torch.zeros_like(sums.x), torch.zeros_like(sums.z)
        return sums.x / sums.rows, sums.z / sums.rows
