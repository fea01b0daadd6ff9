"""Scores of parts from the model without each: its loss, its perplexity, or how far its output is from the whole model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from depgraph import DependencyGraph
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.candidates import OF, names_of
from importance.depth.engine import NORMAL, Batches, Effort, Engine
from importance.depth.metrics import LossMetric, Metric
from importance.depth.order import Counted
from importance.losses import Loss

_LARGEST = 700.0  # whose exp is still a number


@dataclass(frozen=True)
class Without:
    """The value of the whole model without each of its blocks or branches: SLEB's second metric (METHODS.md 2.5).

    Args:
        batches: tensors, tuples or dicts.
        of: "blocks" or "branches".
        metric: None is the loss or, for models without one, the distance of outputs "norm".

    Raises ScoreError: an unknown `of`; when called, no such parts. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    of: str = "blocks"
    metric: Metric | None = None
    effort: Effort = NORMAL

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(OF, self.of, "kind of part")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        names = names_of(graph, self.of)
        engine = Engine(graph, self.batches, names, self.metric, self.effort)
        found = Counted()
        for name in names:
            found[name] = engine.value([name])
        found.evaluations = engine.evaluations
        return found


@dataclass(frozen=True)
class Perplexity:
    """Shortened-LLaMA's PPL (METHODS.md 2.7): exp of the mean loss of the model without each block or branch.

    `loss` is as in `importance.Taylor`; a batch weighs as many samples. Raises as `Without` does, ScoreError without a loss.
    """

    batches: Batches = field(repr=False)
    of: str = "blocks"
    loss: Loss | None = None
    effort: Effort = NORMAL

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(OF, self.of, "kind of part")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        metric = LossMetric(self.loss, nonnegative=self.loss is None)
        found = Without(self.batches, self.of, metric, self.effort)(graph)
        for name, value in found.items():
            found[name] = math.exp(min(value, _LARGEST))
        return found
