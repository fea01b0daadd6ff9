"""What comes into a consumer, as rows of channels: one for every position (token, pixel) of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 17
_WIDE, _NARROW = 128, 32  # columns


@dataclass(frozen=True)
class Rows:
    """`values` [samples, positions, channels] in float32 or wider; `text` [samples, positions] says which rows count, None: all.

    `whole`: how many samples they are of where these can't be told apart, `values` then has all as one. What is `shared` comes
    into several consumers (queries, keys and values): what was summed of it stays for the next.
    """

    values: Tensor
    text: Tensor | None = None
    shared: bool = False
    whole: int = 0
    _products: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def flat(self) -> Tensor:
        """The rows that count: [rows, channels]."""
        return self.values.flatten(0, 1) if self.text is None else self.values[self.text]

    @cached_property
    def count(self) -> int:
        """How many rows count."""
        return self.values.shape[0] * self.values.shape[1] if self.text is None else len(self.flat)

    @cached_property
    def pieces(self) -> Sequence[Tensor]:
        """The rows that count, [..., channels], so many at a time that they stay in the cache on a CPU.

        Where channels come before positions in memory, they are left so: a sum over rows needs no copy in another order.
        """
        rows = self.values if self.text is None and not _flattens(self.values) else self.flat
        return [rows] if rows.numel() <= _PIECE else rows.split(max(1, _PIECE * len(rows) // rows.numel()))

    @cached_property
    def total(self) -> Tensor:
        """Their sum [channels]."""
        return _added([_over_rows(part) for part in self.pieces])

    @cached_property
    def squares(self) -> Tensor:
        """The sum of their squares [channels]."""
        return _added([_squares(part) for part in self.pieces])

    @cached_property
    def absolutes(self) -> Tensor:
        """The sum of |x| [channels]."""
        return _added([_over_rows(part.abs()) for part in self.pieces])

    @cached_property
    def moments(self) -> list[tuple[int, Tensor, Tensor]]:
        """Of each piece the number of rows, their mean [channels], and the sum of the squares of what they are apart from it."""
        return [(part.shape[:-1].numel(), *_moments(part)) for part in self.pieces if part.numel()]

    def product(self, groups: int, to: Tensor) -> Tensor:
        """X'X of the columns of each of so many groups, [groups, columns / groups, columns / groups], added to `to`, in place."""
        apart = self.flat.unflatten(1, (groups, -1)).transpose(0, 1)
        if not self.shared:
            return torch.baddbmm(to, apart.mT, apart, out=None if to.ndim == 0 else to)
        if groups not in self._products:
            self._products[groups] = apart.mT @ apart
        return self._products[groups] + to

    @property
    def each_alone(self) -> Rows:
        """Every row as a sample of its own."""
        return Rows(self.values.flatten(0, 1)[:, None])

    @property
    def samples(self) -> int:
        """How many samples have a row that counts."""
        if self.whole:
            return self.whole
        return len(self.values) if self.text is None else int(self.text.any(dim=1).sum())

    def sample_means(self, values: Tensor) -> Tensor:
        """The mean of [samples, positions, ...] over the positions that count, for samples that have any: [samples, ...]."""
        if self.text is None:
            return values.mean(dim=1)
        weight = self.text.to(values.dtype).reshape(*self.text.shape, *[1] * (values.ndim - 2))
        some = self.text.any(dim=1)
        return ((values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))[some]


def _flattens(values: Tensor) -> bool:
    """Do [samples, positions, channels] become rows without a copy?"""
    (samples, positions, _), (step, inner, _) = values.shape, values.stride()
    return samples == 1 or positions == 1 or step == inner * positions


def _over_rows(part: Tensor) -> Tensor:
    """The sum of [..., channels] over all but the channels."""
    return part.sum(dim=tuple(range(part.ndim - 1)))


def _moments(part: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of rows, and the sum of the squares of what they are apart from it, [channels]."""
    count = part.shape[:-1].numel()
    if part.device.type == "cpu" and part.ndim == 2 and part.shape[1] >= _NARROW and part.is_contiguous():
        mean, variance = torch.batch_norm_update_stats(part, None, None, 0.0)  # needs no memory for the differences
        return mean, variance * count
    mean = _over_rows(part) / count
    return mean, _over_rows((part - mean).square_())


def _squares(part: Tensor) -> Tensor:
    """The sum of the squares of rows [channels]; of many, numpy's needs no memory for the squares."""
    if part.numel() < _PIECE // 2 or part.device.type != "cpu" or part.shape[-1] < _WIDE or not part.is_contiguous():
        return _over_rows(part.square())
    array = part.detach().numpy()
    return torch.from_numpy(np.einsum("ij,ij->j", array, array))


def _added(sums: list[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
