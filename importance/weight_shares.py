"""What share channels have in the weights that they meet: of every output's weights, and of every column's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass
class ShareSums:
    """Sums over what channels are multiplied with, `total` of shares of rows [channels], `columns` that aren't zero [channels]."""

    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    columns: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, weights: Tensor) -> None:
        """Take in weights [groups, outputs, channels, places], each output with the channels of its group alone."""
        sizes = weights.abs()
        row = sizes.sum(dim=(2, 3), keepdim=True)
        self.total = (sizes * torch.where(row > 0, 1 / row, 0)).sum(dim=(1, 3)).flatten() + self.total.to(row)
        there = sizes.amax(dim=1).gt(0).sum(dim=2).flatten()
        self.columns = torch.maximum(there.to(row), self.columns.to(row))

    @property
    def value(self) -> Tensor:
        """sum_i |W_ij| / sum_k |W_ik| + sum_i |W_ij| / sum_l |W_lj| over the columns of a channel, [channels]: 0 without weights."""
        return self.total + self.columns


@dataclass(frozen=True)
class WeightShares:
    """Asks for `ShareSums`."""

    view: ClassVar[str] = "outputs"

    def start(self, consumer: Any = None) -> ShareSums:
        return ShareSums()
