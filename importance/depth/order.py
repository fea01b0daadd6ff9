"""What a search gives: which parts go, in order, with the value at each step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from depgraph import DependencyGraph
from depgraph.plotting import plot_curve
from depgraph.scoring import DepthScorer
from importance.choices import pick

CURVES: dict[str, Callable[[float], float]] = {"value": float, "perplexity": lambda loss: math.exp(min(loss, 700.0))}


@dataclass(frozen=True)
class Step:
    """A part that goes, the value that the search gave it there, and the layer evaluations so far."""

    name: str
    value: float
    evaluations: int


@dataclass(frozen=True)
class Order:
    """An order of removal; `whole` is the value of the model as it is (NaN where a method has none)."""

    steps: tuple[Step, ...]
    whole: float
    evaluations: int

    @property
    def names(self) -> tuple[str, ...]:
        """What goes, in order."""
        return tuple(step.name for step in self.steps)

    @property
    def value(self) -> float:
        """The value at the end."""
        return self.steps[-1].value if self.steps else self.whole

    def plot(self, path: str | os.PathLike[str], curve: str = "value") -> None:
        """Draw the value at each step, or what it is as a "perplexity" (its exp, where it is a loss), against what is removed.

        Raises ScoreError for an unknown `curve`, DataError without matplotlib (the extra `plot`).
        """
        of = pick(CURVES, curve, "curve")
        plot_curve([of(self.whole), *(of(step.value) for step in self.steps)], self.names, path, curve)


class Counted(dict[str, float]):
    """Scores, and the layer evaluations that they took."""

    evaluations: int = 0


class Search(Protocol):
    """Finds which `count` parts of a graph go."""

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order: ...


__all__ = ["Counted", "DepthScorer", "Order", "Search", "Step"]
