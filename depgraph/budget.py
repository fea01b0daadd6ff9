"""A target on one graph: what a removal spends of each measure that the target names, and how far that is above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from depgraph.errors import TargetError
from depgraph.target import Target
from depgraph.unmet import LATENCY, Unmet, sized
from depgraph.widths import Kept, Removal, stored_values

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_SMALLEST = 1e-9  # of the dense milliseconds: what counts as a difference of latency
_MOST_HOLDERS = 3
_STORED: dict[str, Callable[[float], str]] = {"bytes": sized, "params": lambda count: f"{count:,.0f}"}
Spent = dict[str, float]


class Budget:
    """The limits of a target, by measure, and what the dense model spends: counts, and milliseconds under "latency".

    What `branches` cost isn't spent, as they are left out in any case.
    `metric` is the measure that a group's cost is told in: latency, where that is limited, else the first one given.
    """

    def __init__(self, graph: DependencyGraph, target: Target, branches: tuple[str, ...] = ()) -> None:
        self.graph = graph
        self.target = target
        dense = graph.dense_cost
        self.limits: Spent = {m: share * getattr(dense, m) for m, share in target.shares.items()}
        if target.most_bytes is not None:
            self.limits["bytes"] = float(target.most_bytes)
        if target.latency_ms is not None:
            self.limits = {LATENCY: target.latency_ms, **self.limits}
        self.metric = next(iter(self.limits))
        self.branches: tuple[str, ...] = ()
        self.gone: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        self.dense = self.spent({})
        if branches:
            left_out = graph.left_out(branches)
            self.branches, self.gone = branches, (left_out.parameters, left_out.nodes)
        if target.latency is not None and not self.dense[LATENCY] > 0:
            raise TargetError(f"the latency model says {self.dense[LATENCY]} ms for the dense model: measure it again")

    def spent(self, removal: Removal) -> Spent:
        """What the model spends after a removal (axis name -> group numbers), by measure."""
        return self.spent_at(self.graph.widths.at(removal))

    def spent_at(self, kept: Kept) -> Spent:
        """What remains spends, by measure."""
        found: Spent = {}
        cost = kept.cost(*self.gone) if set(self.limits) - {LATENCY} else None
        for measure in self.limits:
            if measure == LATENCY:
                assert self.target.latency is not None
                found[measure] = float(self.target.latency.ms(kept.without(self.branches)))
            else:
                found[measure] = getattr(cost, measure)
        return found

    def over(self, spent: Spent) -> float:
        """By which share of the dense model it is above its limit, the most of all measures: at most 0 where it is met."""
        return max((spent[m] - limit) / max(self.dense[m], self.least(m)) for m, limit in self.limits.items())

    def met(self, spent: Spent) -> bool:
        return all(spent[m] <= limit for m, limit in self.limits.items())

    def tightest(self, spent: Spent) -> str:
        """The measure that is least below its limit, as a share of the dense model's."""
        return max(self.limits, key=lambda m: (spent[m] - self.limits[m]) / max(self.dense[m], self.least(m)))

    def gain(self, spent: Spent) -> float:
        """What was saved, as shares of the dense model, added over all measures."""
        return sum((self.dense[m] - spent[m]) / max(self.dense[m], self.least(m)) for m in self.limits)

    def least(self, measure: str) -> float:
        """The smallest difference that counts."""
        return 1.0 if measure != LATENCY else _SMALLEST * max(self.dense.get(LATENCY, 1.0), 1e-9)

    def unmet(self, kept: Kept, allow: str, more: str = "") -> Unmet:
        """What remains at the least, as `allow` says, and what holds it; `more` is said behind that."""
        return Unmet(allow, self.spent_at(kept), f"{self._held_by(kept)}{more}")

    def unread(self) -> str:
        """How much of the parameters the traced forward doesn't read, so that they stay; empty where it reads them."""
        idle = self.graph.capture.program.unread()
        count = sum(math.prod(v.shape) for v in idle)
        if not count or self.metric not in ("params", "bytes"):
            return ""
        share = count / max(self.graph.dense_cost.params, 1)
        return f"; the traced forward doesn't read {share:.1%} of the parameters, such as {idle[0].target!r}, and these stay"

    def _held_by(self, kept: Kept) -> str:
        """What takes most of the first measure that is above its limit: operators of time, tensors of bytes and parameters."""
        spent = self.spent_at(kept)
        lacking = next((measure for measure, limit in self.limits.items() if spent[measure] > limit), None)
        if lacking == LATENCY and self.target.latency is not None:
            parts = self.target.latency.parts(kept.without(self.branches))
            return _holders(parts, {name: f"{name} {ms:.3g} ms" for name, ms in parts.items()})
        if lacking is None or lacking not in _STORED:
            return ""
        sizes = self._stored(kept, lacking)
        return _holders(sizes, {name: f"{name} {_STORED[lacking](size)}" for name, size in sizes.items()})

    def _stored(self, kept: Kept, measure: str) -> dict[str, float]:
        """What each tensor that stays takes, by its name."""
        gone, found = kept.gone.tensors | self.gone[0], dict[str, float]()
        for value in stored_values(self.graph.capture.program):
            if value.target not in gone and (measure == "bytes" or value.kind == "parameter"):
                found[value.target] = math.prod(kept.shape(value)) * (value.itemsize if measure == "bytes" else 1)
        return found


def _holders(parts: Mapping[str, float], said: Mapping[str, str]) -> str:
    """The largest of some parts, as they are said, and their share of all."""
    order = sorted((name for name in parts if parts[name] > 0), key=lambda name: -parts[name])[:_MOST_HOLDERS]
    share = sum(parts[name] for name in order) / (sum(parts.values()) or 1.0)
    return f"; what remains is held by {', '.join(said[name] for name in order)} ({share:.0%} of it)" if order else ""
