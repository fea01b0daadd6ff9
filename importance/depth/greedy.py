"""Greedy searches: the part without which the model is best goes first, then the next of what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.candidates import between_ends, names_of, parts_of, require_count
from importance.depth.engine import NORMAL, Batches, Effort, Engine
from importance.depth.influence import BlockInfluence
from importance.depth.metrics import DISTANCES, Distance, Metric
from importance.depth.order import Order, Step
from importance.depth.ranking import OneShot
from importance.depth.without import Without

Allowed = Callable[[Sequence[str]], Sequence[str]]
"""Which parts may go next, given those that went."""


def greedy(engine: Engine, count: int, allowed: Allowed) -> Order:
    """Remove `count` units one by one: of those allowed, always the one without which the value is lowest, first if several."""
    gone: list[str] = []
    steps = []
    for _ in range(count):
        may = sorted(set(allowed(gone)) - set(gone), key=engine.order.__getitem__)
        best = engine.best([frozenset([*gone, name]) for name in may])
        (name,) = best.removed - set(gone)
        gone.append(name)
        steps.append(Step(name, best.value, engine.evaluations))
        engine.only_with(frozenset(gone))
    return Order(tuple(steps), engine.value(()), engine.evaluations)


@dataclass(frozen=True)
class Sleb:
    """SLEB's elimination of blocks (METHODS.md 2.5), with its three metrics.

    "greedy": the loss of what is left without a block, again at each step; "single": the loss of the whole model without it;
    "similarity": 1 - cosine of its input and output. The first `first` and last `last` blocks stay.

    The choices are those of the published procedure, for fewer layer evaluations, see `importance.depth.engine`; `metric`
    takes the place of the loss (None: the loss, or for models without one the distance of outputs).

    Raises ScoreError: an unknown name; when called, no blocks, or too few for `count`. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    by: str = "greedy"
    first: int = 1
    last: int = 1
    metric: Metric | None = None
    effort: Effort = NORMAL
    nested: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick({"greedy": 0, "single": 0, "similarity": 0}, self.by, "metric of SLEB")

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order:
        names = names_of(graph, "blocks")
        may = between_ends(names, self.first, self.last)
        require_count(count, len(may), "blocks")
        if self.by == "similarity":
            return OneShot(BlockInfluence(self.batches), only=may)(graph, count)
        if self.by == "single":
            return OneShot(Without(self.batches, metric=self.metric, effort=self.effort), only=may)(graph, count)
        return greedy(Engine(graph, self.batches, names, self.metric, self.effort), count, lambda gone: may)


@dataclass(frozen=True)
class FinerCut:
    """FinerCut (METHODS.md 2.26): greedy over attention and MLP branches, by the distance of outputs from the whole model's.

    `late` is the share of the branches, the first in order of execution, that stay until one more than their number is gone
    (the published option is 0.4, here none by default). Candidates are tried in order of execution, where the published code
    sorts names; of equal ones the first goes. `of="blocks"` removes blocks. `kinds` are those of `graph.branches` that may go;
    None: all.

    Raises ScoreError: an unknown distance, a share out of range; when called, no branches, or too few for `count`.
    """

    batches: Batches = field(repr=False)
    distance: str = "js"
    late: float = 0.0
    of: str = "branches"
    kinds: tuple[str, ...] | None = ("attention", "mlp")
    effort: Effort = NORMAL
    nested: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(DISTANCES, self.distance, "distance of outputs")
        if not 0 <= self.late < 1:
            raise ScoreError(f"the share of branches that go late must lie in [0, 1), it is {self.late}")

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order:
        names, may = names_of(graph, self.of), self._candidates(graph)
        held = int(self.late * len(may))
        require_count(count, len(may), self.of)
        if min(count, held + 1) > len(may) - held:
            raise ScoreError(
                f"{count} {self.of} can't go: late={self.late} holds {held} of {len(may)} back until {held + 1} are gone, so "
                "that there are too few to begin with; give a smaller share"
            )
        engine = Engine(graph, self.batches, names, Distance(self.distance), self.effort)
        return greedy(engine, count, lambda gone: may[held:] if len(gone) < held + 1 else may)

    def _candidates(self, graph: DependencyGraph) -> tuple[str, ...]:
        parts = parts_of(graph, self.of)
        if self.of == "blocks" or self.kinds is None:
            return tuple(part.name for part in parts)
        found = tuple(part.name for part in parts if getattr(part, "kind", "") in self.kinds)
        if not found:
            kinds = ", ".join(sorted({branch.kind for branch in graph.branches}))
            raise ScoreError(
                f"no branch is one of {', '.join(self.kinds)}: the kinds are {kinds}, name them or pass kinds=None"
            )
        return found
