"""The Kronecker factors of one weight's curvature, summed over backward passes, and what groups of its rows or columns cost by them.

With A the second moment of what comes into a linear map W and G that of the gradients of what it puts out, the loss's Hessian
is about G (x) A. Removing the rows R together, what stays making up for them in the best way, costs
1/2 tr(W_R A W_R' [(G^-1)_RR]^-1): rows that go together can't make up for one another (METHODS.md 2.14, for several rows). The
columns C cost 1/2 tr(W_C' G W_C [(A^-1)_CC]^-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from depgraph.classes import NONE
from depgraph.errors import ScoreError
from importance.layout import Place
from importance.problems import alike, columns_of, damped, inverse_of
from importance.products import Product, Rows


@dataclass(frozen=True)
class Side:
    """A matrix that loses rows: `matrix` [rows, columns], and `curvature` [rows, rows], the rows' own factor.

    energy: the columns' factor F [columns, columns]; or, where it is `summed`, what that comes to: W F W' [rows, rows], or the
    diagonal of it [rows]. `where` says whose curvature it is.
    """

    matrix: Tensor
    curvature: Tensor
    energy: Tensor
    summed: bool = False
    where: str = "a weight"

    def costs(self, labels: np.ndarray, size: int) -> Tensor:
        """What each of `size` groups costs, whose rows have its number among `labels` [rows]: float64; 0 for one without rows."""
        found = torch.zeros(size, dtype=torch.float64)
        for groups, at in alike(columns_of(labels), range(size)):
            found[groups] = (self._alone(at[:, 0]) if at.shape[1] == 1 else self._together(at)) / 2
        return found

    @cached_property
    def _inverse(self) -> Tensor:
        return inverse_of(self.curvature, self.where)

    @cached_property
    def _powers(self) -> Tensor:
        """The diagonal of W F W'."""
        if not self.summed:
            return (self.matrix @ self.energy * self.matrix).sum(dim=1)
        return self.energy if self.energy.ndim == 1 else self.energy.diagonal()

    def _alone(self, at: Tensor) -> Tensor:
        return self._powers[at] / self._inverse.diagonal()[at]

    def _together(self, at: Tensor) -> Tensor:
        """tr(W_R F W_R' [(C^-1)_RR]^-1) of the rows R of each group: [groups, rows of one] -> [groups]."""
        pairs, rows = (at[:, :, None], at[:, None]), self.matrix[at]
        energy = self.energy[pairs] if self.summed else rows @ self.energy @ rows.mT
        return torch.linalg.solve(self._inverse[pairs], energy).diagonal(dim1=1, dim2=2).sum(dim=1)


class FactorSums:
    """What the costs of one weight's rows and columns need, over all rows in which it was used.

    `places` are its dims that some axis cuts. Only what these need is held: G where rows go, A where columns do, and of the
    other one what it comes to.
    """

    def __init__(self, product: Product, places: Sequence[Place]) -> None:
        self.shape = product.weight.shape
        self.outputs, self.columns = (1, 0) if product.turned else (0, 1)
        self.dims = {place.dim for place in places}
        self.used, self.scale = 0, 0.0
        self.sums: dict[str, Tensor] = {}
        self.width = product.matrix.shape[2]
        self.matrix, self.bias = _with_bias(product), product.bias
        self.several = {place.dim for place in places if any(map(_repeats, self.labels(place)))}

    def labels(self, place: Place) -> np.ndarray:
        """The groups of the rows, or columns, of each block of the matrix: [blocks, rows or columns]."""
        if place.dim == self.outputs:
            return place.labels.reshape(len(self.matrix), -1)
        windows = np.repeat(place.labels, self.width // len(place.labels))
        bias = np.full(self.matrix.shape[2] - self.width, NONE)
        return np.tile(np.concatenate([windows, bias]), (len(self.matrix), 1))

    def add(self, product: Product, rows: Rows) -> None:
        """Take in the rows of one use, those with a gradient."""
        counts = rows.gradients.ne(0).any(dim=2).any(dim=0)
        given = (rows.inputs, rows.gradients)
        inputs, gradients = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in given)
        if not bool(counts.all()):
            inputs, gradients = inputs[:, counts], gradients[:, counts]
        if self.matrix.shape[2] > self.width:
            inputs = torch.cat([inputs, inputs.new_full((*inputs.shape[:2], 1), product.bias is not None)], dim=2)
        self.scale = self.scale or _inverse_size(gradients)
        gradients = gradients * self.scale
        self.used += inputs.shape[1]
        if self.outputs in self.dims:
            self._sum("gradients", gradients.mT @ gradients)
        else:
            self._sum("gradients' power", gradients.square().mean(dim=2).sum(dim=1))
            self._sum("back", self._power(gradients @ self.matrix.to(gradients), self.columns))
        if self.columns in self.dims:
            self._sum("inputs", inputs.mT @ inputs)
        else:
            self._sum("inputs' power", inputs.square().mean(dim=2).sum(dim=1))
            self._sum("outputs", self._power(inputs @ self.matrix.to(inputs).mT, self.outputs))

    def _power(self, made: Tensor, dim: int) -> Tensor:
        return made.mT @ made if dim in self.several else made.square().sum(dim=1)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = value + self.sums[name] if name in self.sums else value

    def costs(self, damping: float, name: str, places: Sequence[tuple[Place, int]]) -> list[Tensor]:
        """What the groups of some places cost, each of so many groups: float64 [groups] for each.

        Groups of columns have all windows of a convolution's channel; those of its groups are added.
        """
        mean = self.means(name)
        sides = {dim: self.sides(dim, mean, damping, name) for dim in {place.dim for place, _ in places}}
        found = []
        for place, size in places:
            blocks = zip(sides[place.dim], self.labels(place), strict=True)
            cost = torch.stack([side.costs(labels, size) for side, labels in blocks]).sum(dim=0)
            found.append(cost / self.scale**2 if self.scale else cost)
        return found

    def means(self, name: str) -> dict[str, Tensor]:
        """What was summed for each row that was used, float64; raises ScoreError where that isn't finite."""
        found = {n: (s / max(self.used, 1)).cpu().double() for n, s in self.sums.items()}
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise ScoreError(
                f"NaN or infinity comes in at {name!r}, or back to it: look at the weights before it and the batches"
            )
        return found

    def sides(self, dim: int, mean: Mapping[str, Tensor], damping: float, name: str) -> list[Side]:
        """A side for each block: its outputs go, or its columns."""
        matrix = self.matrix.cpu().double()
        if dim == self.outputs:
            own, other, made, where = "gradients", "inputs", "outputs", f"the gradients at {name}"
        else:
            own, other, made, where = "inputs", "gradients", "back", f"the input of {name}"
            matrix = matrix.mT
        found = []
        for k, rows in enumerate(matrix):
            curvature = damped(mean[own][k], damping)
            if other in mean:
                found.append(Side(rows, curvature, damped(mean[other][k], damping), False, where))
                continue
            energy = mean[made][k]
            beside = rows @ rows.mT if energy.ndim == 2 else rows.square().sum(dim=1)
            power = float(mean[f"{other}' power"][k])
            found.append(Side(rows, curvature, energy + (damping * power if power else 1.0) * beside, True, where))
        return found


def _repeats(labels: np.ndarray) -> bool:
    present = labels[labels != NONE]
    return len(np.unique(present)) < len(present)


def _with_bias(product: Product) -> Tensor:
    """[blocks, outputs, columns], the bias as one more column."""
    matrix = product.matrix
    if product.bias is None:
        return matrix
    return torch.cat([matrix, product.bias.detach().reshape(*matrix.shape[:2], 1).to(matrix)], dim=2)


def _inverse_size(gradients: Tensor) -> float:
    """One over the largest gradient, that their squares stay within float32's range; 0 where there are none."""
    size = float(gradients.abs().max()) if gradients.numel() else 0.0
    return 1 / size if size else 0.0
