"""From a budget to a target: what a plan may leave so that the file of some precision keeps within it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import depgraph
from depgraph.dependency import DependencyGraph
from depgraph.unmet import LATENCY, Unmet
from exporters.building.asked import Budget
from exporters.building.precisions import Precision
from exporters.timing.model import MeasuredLatency

_NOTHING = 2  # bytes
_JUST = 1.0001  # of the least time, which is a sum of fractions
_CLOSER = 0.985  # of what would just fit by measure: where rounds end, they should end below


@dataclass(frozen=True)
class Limits:
    """Bytes of float32 weights and milliseconds of the float32 file that a plan may leave; None without a limit."""

    weights: int | None = None
    milliseconds: float | None = None

    @classmethod
    def of(cls, budget: Budget, precision: Precision) -> Limits:
        """What is left for weights where the rest of the file takes more than that is next to nothing, which no plan meets."""
        weights = None if budget.bytes is None else max(precision.weights(budget.bytes), _NOTHING)
        ms = None if budget.latency_ms is None else precision.milliseconds(budget.latency_ms)
        return cls(weights, ms)

    def met(self, graph: DependencyGraph, latency: MeasuredLatency | None) -> bool:
        """Does the dense model keep within them?"""
        small = self.weights is None or graph.dense_cost.bytes <= self.weights
        fast = self.milliseconds is None or latency is None or latency.dense_ms <= self.milliseconds
        return small and fast

    def target(self, latency: MeasuredLatency | None) -> depgraph.Target:
        """The same as a target; one that the dense model meets takes nothing away."""
        timed = {"latency_ms": self.milliseconds, "latency": latency} if self.milliseconds is not None else {}
        return depgraph.Target(bytes=self.weights, **timed)  # type: ignore[arg-type]

    def tighter(self, time: float, weights: int | None) -> Limits:
        """The limits for another round, where the file took `time` times the milliseconds allowed and `weights` bytes would fit."""
        found = self
        if weights is not None:
            found = replace(found, weights=weights)
        if time > 1 and self.milliseconds is not None:
            found = replace(found, milliseconds=self.milliseconds / time * _CLOSER)
        return found

    def lifted(self, unmet: Unmet | None) -> Limits | None:
        """The same where no plan met them, raised to the least that one reaches; None where that isn't known."""
        if unmet is None:
            return None
        weights, ms = self.weights, self.milliseconds
        if weights is not None:
            weights = max(weights, math.ceil(unmet.least.get("bytes", 0)))
        if ms is not None:
            ms = max(ms, unmet.least.get(LATENCY, 0.0) * _JUST)
        return replace(self, weights=weights, milliseconds=ms)
