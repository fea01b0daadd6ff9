"""What comes into a consumer, as rows of channels: one for every position (token, pixel) of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 17
_WIDE = 128


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

    @property
    def pieces(self) -> Sequence[Tensor]:
        """The rows that count, so many at a time that they stay in the cache on a CPU."""
        flat = self.flat
        return [flat] if flat.numel() <= _PIECE else flat.split(max(1, _PIECE // max(flat.shape[1], 1)))

    @cached_property
    def total(self) -> Tensor:
        """Their sum [channels]."""
        return self.flat.sum(dim=0)

    @cached_property
    def squares(self) -> Tensor:
        """The sum of their squares [channels]."""
        pieces = self.pieces
        return pieces[0].square().sum(dim=0) if len(pieces) == 1 else _added([_squares(part) for part in pieces])

    @cached_property
    def absolutes(self) -> Tensor:
        """The sum of |x| [channels]."""
        return _added([part.abs().sum(dim=0) for part in self.pieces])

    @cached_property
    def moments(self) -> list[tuple[int, Tensor, Tensor]]:
        """Of each piece the number of rows, their mean [channels], and the sum of the squares of what they are apart from it."""
        parts = [(len(part), part.mean(dim=0), part) for part in self.pieces if len(part)]
        return [(count, mean, (part - mean).square_().sum(dim=0)) for count, mean, part in parts]

    def product(self, groups: int, to: Tensor) -> Tensor:
        """X'X of the columns of each of so many groups, [groups, columns / groups, columns / groups], added to `to`, in place."""
        apart = self.flat.unflatten(1, (groups, -1)).transpose(0, 1)
        if not self.shared:
            return torch.baddbmm(to, apart.mT, apart, out=None if to.ndim == 0 else to)
        if groups not in self._products:
            self._products[groups] = apart.mT @ apart
        return self._products[groups] + to

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


def _squares(part: Tensor) -> Tensor:
    """The sum of the squares of many rows [channels]; numpy's needs no memory for the squares."""
    if part.device.type != "cpu" or part.shape[1] < _WIDE or not part.is_contiguous():
        return part.square().sum(dim=0)
    array = part.detach().numpy()
    return torch.from_numpy(np.einsum("ij,ij->j", array, array))


def _added(sums: list[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
