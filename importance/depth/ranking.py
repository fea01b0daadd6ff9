"""One-shot removal: all parts are scored once, and the lowest go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.depth.candidates import require_count
from importance.depth.order import DepthScorer, Order, Step


@dataclass(frozen=True)
class OneShot:
    """The parts with the lowest scores, the first in order of execution of equal ones; `only` names those that may go.

    The value at a step is the score. Layer evaluations are those that the scorer says it needed (`evaluations`), else 0.

    Raises ScoreError, when called: scores that are no numbers or of unknown parts, or fewer than `count`.
    """

    scorer: DepthScorer | Mapping[str, float]
    only: Sequence[str] | None = None
    nested: bool = field(default=True, init=False, repr=False)

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order:
        scores = self.scorer if isinstance(self.scorer, Mapping) else self.scorer(graph)
        index = graph.residual.flow.index
        places = {n.name: k for n, k in index.items()}
        ends = {b.name: places[b.add] for b in graph.branches} | {b.name: places[b.output] for b in graph.blocks}
        for name, score in scores.items():
            if name not in ends or not math.isfinite(score):
                what = f"its score is {score}" if name in ends else "the model has no such branch or block"
                raise ScoreError(f"{name!r} can't be ranked: {what}")
        may = [name for name in scores if self.only is None or name in set(self.only)]
        require_count(count, len(may), "parts")
        ranked = sorted(may, key=lambda name: (scores[name], ends[name]))[:count]
        cost = getattr(scores, "evaluations", 0)
        return Order(tuple(Step(name, scores[name], cost) for name in ranked), math.nan, cost)
