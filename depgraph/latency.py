"""What `depgraph` asks of a latency model: how long the model takes at the sizes that a plan leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from depgraph.widths import Kept


class LatencyModel(Protocol):
    """Anything that says milliseconds for what remains of the dims of one graph.

    It may be any function of the sizes: a staircase, or one that falls at some sizes and rises at others. It is asked often
    while a plan is made, so it should answer within a millisecond or so. Where blocks or branches are left out, `kept.left_out` has
    their names. `exporters.MeasuredLatency` is made of measurements.
    """

    def ms(self, kept: Kept, /) -> float:
        """Milliseconds of one run when these indices remain; raises TargetError for another graph than its own."""
        ...

    def parts(self, kept: Kept, /) -> Mapping[str, float]:
        """The same by operator, as what a person can find in the model; together they are `ms`."""
        ...
