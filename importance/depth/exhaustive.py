"""The best set of all: every set of a size is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.candidates import OF, names_of, require_count
from importance.depth.engine import NORMAL, Batches, Effort, Engine
from importance.depth.metrics import Metric
from importance.depth.order import Order, Step


@dataclass(frozen=True)
class Exhaustive:
    """The set of `count` parts without which the value is lowest, by measuring all sets, of which there may be `most`.

    Raises ScoreError, when called: no such parts, too few of them, or more sets than `most`. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    of: str = "blocks"
    metric: Metric | None = None
    effort: Effort = NORMAL
    most: int = 20_000

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(OF, self.of, "kind of part")

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order:
        names = names_of(graph, self.of)
        require_count(count, len(names), self.of)
        if math.comb(len(names), count) > self.most:
            raise ScoreError(
                f"there are {math.comb(len(names), count)} sets of {count} of {len(names)} {self.of}, more than most={self.most}: "
                "use PairSearch, or raise it"
            )
        engine = Engine(graph, self.batches, names, self.metric, self.effort)
        if not count:
            return Order((), engine.value(()), engine.evaluations)
        best = engine.best([frozenset(chosen) for chosen in combinations(names, count)])
        return in_order(engine, best.removed)


def in_order(engine: Engine, chosen: Iterable[str]) -> Order:
    """A set as an order of removal: what the model does best without goes first, again at each step."""
    left, gone, steps = set(chosen), frozenset[str](), []
    while left:
        may = sorted(left, key=engine.order.__getitem__)
        best = engine.best([gone | {name} for name in may])
        (name,) = best.removed - gone
        steps.append(Step(name, best.value, engine.evaluations))
        gone, left = best.removed, left - {name}
    return Order(tuple(steps), engine.value(()), engine.evaluations)
