"""A search of our own: sets, chosen by what all pairs of the likely parts cost, then measured.

Removing parts one by one misses sets whose parts go well together. What a set costs is near the sum of what its parts cost
alone and of what each pair costs beyond that; so all sets can be ranked by it without running the model, the first few are
measured, and the best of these is improved by exchanges that the same sum proposes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.candidates import OF, between_ends, names_of, require_count
from importance.depth.engine import NORMAL, Batches, Effort, Engine
from importance.depth.exhaustive import in_order
from importance.depth.metrics import Metric
from importance.depth.order import Order
from importance.depth.programs import Names

_WORST = 1e30  # in place of infinite costs, whose differences are no numbers
_RANKED = 100_000  # sets that are ranked by their pairs at most


@dataclass(frozen=True)
class PairSearch:
    """The set of `count` parts without which the value is lowest, as far as pairs tell: in `benchmarks/depth.md` nearly always.

    Args:
        batches: tensors, tuples or dicts.
        of: "blocks" or "branches".
        metric: None is the loss or, for models without one, the distance of outputs "norm".
        extra: of how many more parts than `count` the pairs are measured, the best alone; more find more and cost more.
        tries: how many of the best-ranked sets are measured, and how many exchanges at each step.
        ends: how many parts stay at the beginning and at the end.
        effort: memory for hidden states; `share` matters less here, as pairs are measured on all batches.

    Raises ScoreError: a number out of range, an unknown `of`; when called, no such parts or too few. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    of: str = "blocks"
    metric: Metric | None = None
    extra: int = 4
    tries: int = 8
    ends: tuple[int, int] = (0, 0)
    effort: Effort = NORMAL

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(OF, self.of, "kind of part")
        if self.extra < 0 or self.tries < 1:
            raise ScoreError(f"extra must be 0 or more and tries 1 or more, they are {self.extra} and {self.tries}")

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order:
        names = names_of(graph, self.of)
        may = between_ends(names, *self.ends)
        require_count(count, len(may), self.of)
        engine = Engine(graph, self.batches, names, self.metric, self.effort)
        return in_order(engine, self._chosen(engine, may, count))

    def _chosen(self, engine: Engine, may: Sequence[str], count: int) -> Names:
        if count < 2:
            return engine.best([frozenset([name]) for name in may]).removed if count else frozenset()
        pairs = Pairs(engine, may, count + _affordable(count, self.extra))
        found = engine.best(pairs.ranked(pairs.sets(count))[: self.tries])
        while True:
            near = pairs.ranked(pairs.exchanges(found.removed))[: self.tries]
            better = engine.best([found.removed, *near])
            if better.removed == found.removed:
                return found.removed
            found = better


class Pairs:
    """What the `size` parts that cost least alone cost alone and in pairs, beside the whole model."""

    def __init__(self, engine: Engine, may: Sequence[str], size: int) -> None:
        whole = engine.value(())
        alone = {name: min(engine.value([name]) - whole, _WORST) for name in may}
        likely = set(sorted(may, key=alone.__getitem__)[:size])
        self.names = [name for name in may if name in likely]
        self.alone = np.array([alone[name] for name in self.names])
        self.together = np.zeros((len(self.names),) * 2)
        for i, j in combinations(range(len(self.names)), 2):
            both = min(engine.value([self.names[i], self.names[j]]) - whole, _WORST)
            self.together[i, j] = self.together[j, i] = both - self.alone[i] - self.alone[j]

    def sets(self, count: int) -> list[Names]:
        """All sets of so many of them."""
        return [frozenset(chosen) for chosen in combinations(self.names, count)]

    def exchanges(self, chosen: Names) -> list[Names]:
        """The sets with one other in place of one of `chosen`."""
        others = [name for name in self.names if name not in chosen]
        return [chosen - {old} | {new} for old in sorted(chosen, key=self.names.index) for new in others]

    def ranked(self, sets: Iterable[Names]) -> list[Names]:
        """The sets by what their parts and pairs cost."""
        listed = list(sets)
        if not listed:
            return listed
        has = np.array([[name in chosen for name in self.names] for chosen in listed], dtype=float)
        costs = has @ self.alone + np.einsum("ki,ij,kj->k", has, self.together, has) / 2
        return [listed[k] for k in np.argsort(costs, kind="stable")]


def _affordable(count: int, extra: int) -> int:
    """As many extra parts as leave few enough sets to rank."""
    while extra and math.comb(count + extra, count) > _RANKED:
        extra -= 1
    return extra
