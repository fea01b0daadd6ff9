"""Running statistics of the rows that come into a consumer: constant memory, whatever the number and order of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from importance.choices import pick
from importance.rows import Rows


class Statistic(Protocol):
    """What can be asked for: hashable, so that two who ask for the same share it.

    `start(consumer)` makes a fresh accumulator. `view` says what that takes in: "channels" (if absent), "columns" (the windows
    of a convolution laid out), "weights" (what the channels are multiplied with), "outputs" (that by outputs), or "both" (channels and
    weights). What "channels" and "columns" take in may be summed for several consumers at once, into which the same comes. One that
    has `pass_by` is told how many samples were in batches of which nothing came.
    """

    def start(self, consumer: Any = None, /) -> Any: ...


@dataclass
class MomentSums:
    """Number, mean and variance of rows, merged batch by batch (Chan et al. 1979): equal in any order, to rounding."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Rows) -> None:
        """Take in rows [samples, positions, channels]."""
        for new, mean, spread in rows.moments:
            total = self.count + new
            apart = mean - self.mean.to(mean)
            self.squares = self.squares.to(mean) + spread + apart.square() * (self.count * new / total)
            self.mean = self.mean.to(mean) + apart * (new / total)
            self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased (divided by rows - 1), [channels]; zeros where there is one row only."""
        return self.squares / max(self.count - 1, 1)


@dataclass
class NormSums:
    """The sum of x^2 over all rows [channels], the numbers of rows and of samples."""

    rows: int = 0
    samples: int = 0
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Rows) -> None:
        """Take in rows [samples, positions, channels]."""
        self.rows += rows.count
        self.samples += rows.samples
        self.squares = rows.squares + self.squares.to(rows.values)

    def pass_by(self, samples: int) -> None:
        """Take in samples of which nothing came here."""
        self.samples += samples

    @property
    def norm(self) -> Tensor:
        """||X_j|| over the root of the number of samples, [channels]: Wanda's factor."""
        return (self.squares / max(self.samples, 1)).sqrt()


@dataclass
class AbsoluteSums:
    """The sum of |x| over all rows [channels], and their number."""

    rows: int = 0
    absolutes: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Rows) -> None:
        """Take in rows [samples, positions, channels]."""
        self.rows += rows.count
        self.absolutes = rows.absolutes + self.absolutes.to(rows.values)

    @property
    def mean(self) -> Tensor:
        """mean |x|, [channels]."""
        return self.absolutes / max(self.rows, 1)


_OVER_POSITIONS = {
    "mean": lambda rows: rows.sample_means(rows.values.abs()),
    "l2": lambda rows: rows.sample_means(rows.values.square()).sqrt(),
    "var": lambda rows: rows.sample_means(rows.values.square()) - rows.sample_means(rows.values).square(),
}
_OVER_SAMPLES = {
    "mean": lambda sums: sums.total / max(sums.count, 1),
    "l2": lambda sums: sums.squares.sqrt(),
    "var": lambda sums: (sums.squares - sums.total.square() / max(sums.count, 1)) / max(sums.count, 1),
}


@dataclass
class SampleSums:
    """Per sample one number a channel, over its positions; then sums of these and of their squares, [channels].

    Where samples can't be told apart, as among rows that a router picked, every row is one.
    """

    positions: str
    samples: str
    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Rows) -> None:
        """Take in rows [samples, positions, channels]."""
        each = _OVER_POSITIONS[self.positions](rows.each_alone if rows.whole else rows)
        self.count += len(each)
        self.total = each.sum(dim=0) + self.total.to(each)
        self.squares = each.square().sum(dim=0) + self.squares.to(each)

    @property
    def value(self) -> Tensor:
        """The aggregate over samples, [channels]."""
        found: Tensor = _OVER_SAMPLES[self.samples](self)
        return found


FEW = 4
"""Rows are few where there are at least so many times as many columns."""


@dataclass
class GramSums:
    """X'X [columns, columns], the sums of rows and of their squares [columns] and their number.

    Where columns of different `groups` (of a convolution) never meet in one output, only what those of one group have with one
    another is summed: `parts` [groups, columns / groups, columns / groups]. Rows wait in `held` until they are no longer few, so
    that many are multiplied at once; where there never are more, they say all by themselves.
    """

    groups: int = 1
    rows: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    summed: Tensor | None = None
    held: list[Tensor] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        """Take in rows [samples, positions, columns]."""
        flat = rows.flat
        self.rows += len(flat)
        self.total = rows.total + self.total.to(flat)
        self.squares = rows.squares + self.squares.to(flat)
        waiting, columns = len(flat) + sum(one.shape[1] for one in self.held), flat.shape[1] // self.groups
        if waiting * FEW <= columns:
            apart = flat.unflatten(1, (self.groups, -1)).transpose(0, 1)
            self.held.append(apart.clone(memory_format=torch.contiguous_format))
            return
        start = flat.new_zeros(()) if self.summed is None else self.summed.to(flat)
        for one in self.held:
            start = torch.baddbmm(start, one.mT, one)
        self.summed, self.held = rows.product(self.groups, start), []

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return len(self.total)

    @property
    def gram(self) -> Tensor:
        """[columns, columns], zero where columns of different groups meet."""
        return torch.block_diag(*(self._of(group, slice(None)) for group in range(self.groups)))

    @property
    def diagonal(self) -> Tensor:
        """The sum of x^2, [columns]."""
        return self.squares

    def between(self, start: int, stop: int) -> Tensor:
        """The square of the columns [start, stop), which are of one group."""
        return self._of(*self._place(start, stop))

    def few(self, start: int, stop: int) -> Tensor | None:
        """All rows [rows, stop - start] of these columns, which are of one group; None where rows aren't few."""
        group, at = self._place(start, stop)
        return None if self.summed is not None or not self.held else self._held(group, at)

    def _place(self, start: int, stop: int) -> tuple[int, slice]:
        group, first = divmod(start, self.columns // self.groups)
        return group, slice(first, first + stop - start)

    def _held(self, group: int, at: slice) -> Tensor:
        return torch.cat([apart[group, :, at] for apart in self.held])

    def _of(self, group: int, at: slice) -> Tensor:
        """X'X of some columns of one group."""
        if not self.held:
            return self.total.new_zeros(()) if self.summed is None else self.summed[group, at, at]
        waiting = self._held(group, at)
        found = waiting.T @ waiting
        return found if self.summed is None else found + self.summed[group, at, at]


_OF_WEIGHTS: dict[str, tuple[Callable[[Rows], Tensor], Callable[[WeightSums], Tensor]]] = {
    "absolute": (lambda rows: rows.absolutes, lambda sums: sums.total / max(sums.rows, 1)),
    "square": (lambda rows: rows.squares, lambda sums: sums.total / max(sums.samples, 1)),
}


@dataclass
class WeightSums:
    """Of what channels are multiplied with, rows [outputs] of columns [channels]: a sum over rows of what `kind` says."""

    kind: str
    rows: int = 0
    samples: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Rows) -> None:
        """Take in rows [samples, outputs, channels]."""
        self.rows += rows.count
        self.samples += rows.samples
        self.total = _OF_WEIGHTS[self.kind][0](rows) + self.total.to(rows.values)

    @property
    def value(self) -> Tensor:
        """What `Weights` asks for, [channels]; squares of what isn't a weight but computed are a mean over samples."""
        return _OF_WEIGHTS[self.kind][1](self)


@dataclass(frozen=True)
class Weights:
    """Asks for `WeightSums`: mean_i |W_ij| ("absolute") or sum_i W_ij^2 ("square")."""

    view: ClassVar[str] = "weights"

    kind: str = "absolute"

    def __post_init__(self) -> None:
        pick(_OF_WEIGHTS, self.kind, "sum over weights")

    def start(self, consumer: Any = None) -> WeightSums:
        return WeightSums(self.kind)


@dataclass(frozen=True)
class Moments:
    """Asks for `MomentSums` of a view, see `Statistic`."""

    view: str = "channels"

    def start(self, consumer: Any = None) -> MomentSums:
        return MomentSums()


@dataclass(frozen=True)
class Norms:
    """Asks for `NormSums`."""

    def start(self, consumer: Any = None) -> NormSums:
        return NormSums()


@dataclass(frozen=True)
class Absolutes:
    """Asks for `AbsoluteSums`."""

    def start(self, consumer: Any = None) -> AbsoluteSums:
        return AbsoluteSums()


@dataclass(frozen=True)
class SampleMeans:
    """Asks for `SampleSums`: |x| over a sample's positions by `positions` ("mean", "l2", "var"), over samples by `samples`."""

    positions: str = "mean"
    samples: str = "l2"

    def __post_init__(self) -> None:
        pick(_OVER_POSITIONS, self.positions, "aggregation over positions")
        pick(_OVER_SAMPLES, self.samples, "aggregation over samples")

    def start(self, consumer: Any = None) -> SampleSums:
        return SampleSums(self.positions, self.samples)


@dataclass(frozen=True)
class Gram:
    """Asks for `GramSums`, over the columns of the weights: for a convolution, its windows, for every group of it alone."""

    view: ClassVar[str] = "columns"

    def start(self, consumer: Any = None) -> GramSums:
        return GramSums(getattr(consumer, "groups", 1))


def finite(accumulator: Any) -> bool:
    """Are all tensors of an accumulator free of NaN and infinity?"""
    return all(bool(torch.isfinite(t).all()) for value in vars(accumulator).values() for t in _tensors(value))


def _tensors(value: Any) -> Iterable[Tensor]:
    leaves = pytree.tree_leaves(value) if isinstance(value, (list, tuple, dict)) else (value,)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))
