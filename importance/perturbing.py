"""Sub-models of a model: for each of some axes a few candidates, of which a part is taken out and then the rest of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from depgraph import DependencyGraph
from depgraph.cutting.sides import Side


@dataclass(frozen=True)
class Candidates:
    """The groups of an axis that are tried (`groups`), how likely each is to go, and how many of them go at once, on average.

    Other numbers that may go at once differ from that by multiples of `step`.
    """

    axis: str
    groups: np.ndarray
    chances: np.ndarray
    going: int
    step: int = 1

    @classmethod
    def of(cls, graph: DependencyGraph, name: str, prior: np.ndarray, share: float) -> Candidates:
        """The lowest of an axis by `prior` [groups]: twice as many as go at once, which are a share of all, and one more.

        Chances are in proportion to how far a candidate lies below the highest prior of the axis. Where operators take some
        sizes only, so many go that such a size is left.
        """
        axis, step = graph[name], graph.widths.step(name)
        free = np.flatnonzero(axis.prunable)
        order = free[np.argsort(prior[free], kind="stable")]
        most = min(len(order), axis.size - graph.widths.least(name) if not axis.exact else axis.size)
        going = int(share * axis.size) + 1
        going += (axis.size - going) % step
        tried = order[: min(2 * going, most)] if going <= most else order[:0]
        below = float(prior[free].max(initial=0.0)) - prior[tried]
        even = np.full(len(tried), 1 / max(len(tried), 1))
        chances = below / below.sum() if below.sum() > 0 else even
        return cls(name, tried, (1 - _EVEN) * chances + _EVEN * even, min(going, len(tried)), step)

    def drawn(self, generator: np.random.Generator) -> np.ndarray:
        """Which candidates stay, bool [candidates].

        How many don't is drawn too, from none to all. If the same number always went, what the axis loses would be the same in
        all sub-models, and its candidates would compare with one another but not with those of other axes.
        """
        stays = np.ones(len(self.groups), dtype=bool)
        count = generator.choice(np.arange(self.going % self.step, len(self.groups) + 1, self.step))
        stays[generator.choice(len(self.groups), count, replace=False, p=self.chances)] = False
        return stays


_EVEN = 1e-6  # how much of a chance any candidate has


def masks(pool: Iterable[Candidates], pairs: int, generator: np.random.Generator) -> np.ndarray:
    """Which candidates of all axes, one after the other, stay in each sub-model: bool [2 * pairs, candidates].

    Every second row is the complement of the one before it.
    """
    listed = list(pool)
    drawn = [np.concatenate([one.drawn(generator) for one in listed]) for _ in range(pairs)]
    return np.stack([row for stays in drawn for row in (stays, ~stays)])


def removal(pool: Iterable[Candidates], stays: np.ndarray) -> dict[str, np.ndarray]:
    """The groups that a mask [candidates] takes out of each axis."""
    found, start = {}, 0
    for one in pool:
        here = stays[start : start + len(one.groups)]
        start += len(one.groups)
        found[one.axis] = one.groups[~here]
    return found


def side(graph: DependencyGraph, gone: Mapping[str, np.ndarray]) -> Side:
    """The graph's program without groups: filled with zeros where that is the same as removing them, cut where it isn't."""
    exact = {name: groups.tolist() for name, groups in gone.items() if graph[name].exact and len(groups)}
    mixed = {name: groups.tolist() for name, groups in gone.items() if not graph[name].exact and len(groups)}
    return Side(graph.widths.at(mixed), graph.widths.at(exact))
