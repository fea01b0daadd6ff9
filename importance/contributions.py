"""How much a group adds to what its consumers put out: AMP's score of heads (METHODS.md 2.28)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph.classes import NONE
from importance.consumers import Consumer
from importance.reduction import Scored
from importance.rows import Rows
from importance.statistics import Statistics


@dataclass
class ContributionSums:
    """For each axis and group: over samples, the sum of the mean over positions of ||x_g W_g||_1.

    x_g are the channels of the group and W_g the columns that they meet. Where every group has one channel, what it adds is
    |x| times the size of its column; AMP leaves the weights out for such, and so does this. Where there are no weights (queries
    that meet keys), it is the sum over the channels of |x| times the mean, over all batches, of the size of what it meets.
    """

    labels: dict[str, np.ndarray]
    stored: bool = True
    groups: int = 1
    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    channels: Tensor = field(default_factory=lambda: torch.zeros(()))
    met: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: int = 0

    def add(self, both: tuple[Rows, Rows]) -> None:
        """Take in channels [samples, positions, channels] and weights [..., outputs, channels]."""
        rows, weights = both
        self.samples += rows.count if rows.whole else rows.samples
        if not self.stored:
            self.rows += weights.count
            self.met = weights.absolutes + self.met.to(weights.values)
            self.channels = _over_samples(rows, rows.values.abs()) + self.channels.to(rows.values)
            return
        given = weights.flat.to(rows.values)
        for axis, labels in self.labels.items():
            each = _contributions(rows, given, labels, self.groups)
            self.sums[axis] = each + self.sums[axis].to(each) if axis in self.sums else each

    def scores(self, axis: str) -> Scored:
        """The groups of an axis that are read here, and the mean over samples."""
        labels = self.labels[axis]
        present = np.bincount(labels[labels != NONE]) > 0
        sums = self.sums[axis] if self.stored else _by_group(self._met_by_channel(labels), labels, len(present))
        found = (sums / max(self.samples, 1)).cpu().double().numpy()
        return np.where(present, np.arange(len(present)), NONE), found

    def _met_by_channel(self, labels: np.ndarray) -> Tensor:
        """What each channel adds where it meets what is computed; where all groups have one channel, without what it meets."""
        alone = int(np.bincount(labels[labels != NONE]).max()) == 1
        return self.channels if alone else self.channels * (self.met / max(self.rows, 1)).to(self.channels)


def _by_group(channels: Tensor, labels: np.ndarray, size: int) -> Tensor:
    read = np.flatnonzero(labels != NONE)
    at = torch.from_numpy(labels[read]).to(channels.device)
    return channels.new_zeros(size).index_add_(0, at, channels[torch.from_numpy(read).to(channels.device)])


def _contributions(rows: Rows, matrix: Tensor, labels: np.ndarray, parts: int) -> Tensor:
    """[groups], summed over samples; each of so many parts of the channels has outputs of its own."""
    read = np.flatnonzero(labels != NONE)
    size = int(labels.max()) + 1
    if len(np.unique(labels[read])) == len(read):
        return _by_group(_over_samples(rows, rows.values.abs()), labels, size)
    found = rows.values.new_zeros(size)
    for group in np.unique(labels[read]):
        for at in _by_part(np.flatnonzero(labels == group), len(labels) // parts):
            added = (rows.values[..., at] @ matrix[:, at].T).abs_().sum(dim=-1)
            found[int(group)] += _over_samples(rows, added)
    return found


def _over_samples(rows: Rows, values: Tensor) -> Tensor:
    """The sum over samples of the means over their positions; where samples can't be told apart, every row is one."""
    return values.flatten(0, 1).sum(dim=0) if rows.whole else rows.sample_means(values).sum(dim=0)


def _by_part(channels: np.ndarray, size: int) -> list[Tensor]:
    """Channels by the part, of so many channels, that they are in."""
    return [torch.from_numpy(channels[channels // size == part]) for part in np.unique(channels // size)]


@dataclass(frozen=True)
class Contributions:
    """Asks for `ContributionSums`."""

    view: ClassVar[str] = "both"

    def start(self, consumer: Any = None) -> ContributionSums:
        return ContributionSums(dict(consumer.labels), consumer.meetings[0].stored, consumer.groups)


def amp(consumer: Consumer, found: Statistics, axis: str) -> Scored:
    """AMP's scores of the groups of an axis that a consumer reads."""
    scores: Scored = found.of(consumer, Contributions()).scores(axis)
    return scores
