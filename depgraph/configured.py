"""A uniform plan of a transformers model: only what a config can express, so that the pruned model is one more config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from depgraph.budget import Budget
from depgraph.configs import Configs, Edits
from depgraph.errors import NothingToPrune, TargetError
from depgraph.explaining import Counts, Explainer
from depgraph.moves import Finder, Move, added
from depgraph.plan import Plan
from depgraph.rounding import Rounding
from depgraph.target import Target
from depgraph.unmet import Unmet

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_MOST_TRIES = 400
_NEAR = 0.1  # as a share of the dense model: a plan that is smaller than wanted by no more is taken as it is
Steps = dict[int, int]  # how many steps of each move, by its number


@dataclass(frozen=True)
class Freedom:
    """Which groups may go, in their order (`order`, at most `cap` of an axis), and the axes that the user wants narrowed.

    `branches` are left out in any case.
    """

    order: Mapping[str, np.ndarray]
    cap: Mapping[str, int]
    leading: list[str]
    rounding: Rounding
    branches: tuple[str, ...] = ()


def configured_plan(graph: DependencyGraph, freedom: Freedom, target: Target) -> Plan:
    """The plan that meets `target` by moves that some config expresses; kinds of axes take turns.

    Raises:
        NothingToPrune: no config expresses any cut.
        TargetError: what configs express doesn't make the model that small.
    """
    search = _Search(graph, freedom, target)
    steps, edits = search.best()
    plan = Plan.of(graph, search.removal(steps), search.notes(), freedom.branches)
    return replace(plan, config={".".join(place): value for place, value in sorted(edits.items())})


class _Search:
    def __init__(self, graph: DependencyGraph, freedom: Freedom, target: Target) -> None:
        self.graph, self.freedom, self.target = graph, freedom, target
        self.budget = Budget(graph, target, freedom.branches)
        self.explainer = Explainer(graph, freedom.order, freedom.cap)
        self.finder = Finder(graph, Configs(graph.model), self.explainer)
        leading = set(freedom.leading)
        self.moves = [move for move in self.finder.moves if leading & move.counts.keys()]
        self.name = type(graph.model).__name__
        if not self.moves:
            raise NothingToPrune(self._nothing())

    def _nothing(self) -> str:
        """Why there is no move: where the model isn't even that of its own config, in what."""
        if other := self.finder.why_not({}, {}):
            return (
                f"{self.name} built anew from its own config isn't this model ({other}), so that no config can express a cut of "
                "it: plan with another scope, or mend that before"
            )
        return f"no config of {self.name} expresses a cut that leaves all layers alike: {self._whole()}"

    def best(self) -> tuple[Steps, Edits]:
        """Steps that meet the target and that a config expresses, and the edits of that config.

        Moves take turns. Where one whose steps are coarse jumps far past the target, the others are tried without its last
        step, and what is nearer to the target counts.
        """
        limits = [move.most for move in self.moves]
        chosen = self._fewest(limits)
        if chosen is None:
            unmet = self._too_small()
            raise TargetError(unmet.sentence(self.target, self.graph.dense_cost), unmet=unmet)
        while chosen[0] and self._slack(chosen[0]) > _NEAR:
            last = self._last(chosen[0])
            limits[last] = chosen[0][last] - 1
            other = self._fewest(limits)
            if other is None or self._slack(other[0]) >= self._slack(chosen[0]):
                break
            chosen = other
        return self._spared(*chosen)

    def _spared(self, steps: Steps, edits: Edits) -> tuple[Steps, Edits]:
        """The same without the moves that a coarse step has made needless."""
        for k in sorted(steps, key=lambda k: self.moves[k].share):
            fewer = {j: n for j, n in steps.items() if j != k}
            if fewer and self._met(fewer) and (found := self._expressed(fewer)) is not None:
                steps, edits = fewer, found
        return steps, edits

    def _last(self, steps: Steps) -> int:
        """The move whose step was the last: that which has taken the largest share of its axis."""
        return max(steps, key=lambda k: (steps[k] * self.moves[k].share, k))

    def _fewest(self, limits: list[int]) -> tuple[Steps, Edits] | None:
        """The first turns, with at most so many steps of each move, that meet the target and that a config expresses."""
        ranking = self._ranking(limits)
        low, high = 0, len(ranking)
        if not self._met(self._steps(ranking, high)):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._met(self._steps(ranking, middle)):
                high = middle
            else:
                low = middle + 1
        for length in range(low, min(len(ranking) + 1, low + _MOST_TRIES)):
            steps = self._steps(ranking, length)
            edits = self._expressed(steps)
            if edits is not None:
                return steps, edits
        return None

    def removal(self, steps: Steps) -> dict[str, np.ndarray]:
        return self.explainer.removal(self._counts(steps))

    def notes(self) -> list[str]:
        whole = self._whole()
        return [f"scope='uniform' leaves whole what no config of {self.name} narrows: {whole}"] if whole else []

    def _ranking(self, limits: list[int]) -> list[tuple[float, int, int]]:
        """All steps of all moves (share of its axis gone, number of the move, steps by then), so that they take turns."""
        entries = []
        for k, move in enumerate(self.moves):
            entries += [(n * move.share, k, n) for n in range(1, limits[k] + 1) if self._is_round(move, n)]
        return sorted(entries)

    def _is_round(self, move: Move, n: int) -> bool:
        for name, gone in move.counts.items():
            step, size = self.freedom.rounding.step(name), self.graph[name].size
            if (size > step or self.freedom.rounding.named) and (size - n * gone) % step:
                return False
        return True

    @staticmethod
    def _steps(ranking: list[tuple[float, int, int]], length: int) -> Steps:
        return {k: n for _, k, n in ranking[:length]}

    def _counts(self, steps: Steps) -> Counts:
        total = added([(self.moves[k], n) for k, n in steps.items()])
        return {axis: min(n, self.freedom.cap[axis]) for axis, n in total.items()}

    def _met(self, steps: Steps) -> bool:
        return self.budget.met(self.budget.spent(self.removal(steps)))

    def _slack(self, steps: Steps) -> float:
        """How far below the limits, as shares of the dense model, added over all measures."""
        return self.budget.gain(self.budget.spent(self.removal(steps))) - self.budget.gain(self.budget.limits)

    def _expressed(self, steps: Steps) -> Edits | None:
        """The edits that express so many steps, without the pins that they don't need; None where the class refuses."""
        edits, counts = self.finder.edits([(self.moves[k], n) for k, n in steps.items()]), self._counts(steps)
        if not self._leaves(edits, counts):
            return None
        shorter = dict(edits)
        for pin in self.finder.pins:
            without = {place: value for place, value in shorter.items() if place != pin}
            pinned = edits[pin] == self.finder.pins[pin]
            shorter = without if pinned and self._leaves(without, counts) else shorter
        return next((found for found in (shorter, edits) if not self.finder.why_not(found, counts)), None)

    def _leaves(self, edits: Edits, counts: Counts) -> bool:
        shapes = self.finder.shapes(edits)
        return shapes is not None and self.explainer.leaves(counts, shapes)

    def _whole(self) -> str:
        """The kinds of axes that could lose groups, but in no move."""
        moved = {axis for move in self.finder.moves for axis in move.counts}
        return ", ".join(dict.fromkeys(self.graph[name].kind for name in self.freedom.order if name not in moved))

    def _too_small(self) -> Unmet:
        ranking = self._ranking([move.most for move in self.moves])
        kept = self.graph.widths.at(self.removal(self._steps(ranking, len(ranking))))
        whole = self._whole()
        stays = f"; no config narrows {whole}" if whole else ""
        allow = f"with scope='uniform', what configs of {self.name} express, floors and protections allow"
        return self.budget.unmet(kept, allow, stays)
