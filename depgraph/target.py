"""The budget: which share of parameters, MACs or bytes is to be kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from depgraph.errors import TargetError
from depgraph.widths import Cost

METRICS = ("params", "macs", "bytes")


@dataclass(frozen=True)
class Target:
    """Shares to keep, each strictly between 0 and 1; where several are given, all must hold.

    ``Target(params=0.7)`` keeps 70% of the parameters; `macs` counts the multiply-accumulates of the traced call, `bytes`
    parameters and buffers as stored. `left_out` is the number of blocks (or branches, whichever are ranked) to leave out.
    Raises TargetError for anything that isn't such a share, or such a number, and when none is given.
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    left_out: float | None = None  # a whole number

    def __post_init__(self) -> None:
        if self.left_out is not None and (type(self.left_out) is not int or self.left_out < 1):
            raise TargetError(f"target left_out={self.left_out!r} is no number of blocks: give 1 or more, left_out=2")
        if not self.shares and self.left_out is None:
            raise TargetError("a target needs at least one of params, macs and bytes, such as Target(params=0.7)")
        for name, share in self.shares.items():
            if isinstance(share, bool) or not isinstance(share, Real) or math.isnan(share):
                raise TargetError(
                    f"target {name}={share!r} is not a number: give the share to keep, such as {name}=0.7"
                )
            if not 0 < share < 1:
                raise TargetError(
                    f"target {name}={share:g} is out of range: give the share to keep, above 0 and below 1 (0.7 keeps 70%)"
                )
            object.__setattr__(self, name, float(share))

    @property
    def shares(self) -> dict[str, float]:
        """The shares that were given, by metric."""
        return {m: value for m in METRICS if (value := getattr(self, m)) is not None}

    @property
    def metric(self) -> str:
        """The first metric given; what a group costs is measured in it."""
        return next(iter(self.shares))

    def met_by(self, cost: Cost, dense: Cost) -> bool:
        """Is every share at or below its target?"""
        return all(getattr(cost, m) <= share * getattr(dense, m) for m, share in self.shares.items())

    def __str__(self) -> str:
        counted = [] if self.left_out is None else [f"left_out={self.left_out}"]
        return ", ".join([f"{m}={share:g}" for m, share in self.shares.items()] + counted)
