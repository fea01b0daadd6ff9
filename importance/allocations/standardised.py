"""FLAP's four ways to spread a budget over layers and modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from depgraph import DependencyGraph
from importance.allocations.allocated import Arrays, at_levels, in_proportion, placed, scored
from importance.allocations.spread import PerKind, Uniform
from importance.choices import pick
from importance.normalisation import gaussian


def z_scores(graph: DependencyGraph, scores: Arrays) -> dict[str, np.ndarray]:
    """The scores of every axis with mean 0 and (unbiased) standard deviation 1 over the groups that may go."""
    return {axis.name: placed(axis, order, gaussian(given)) for axis, order, given in scored(graph, scores)}


def _pooled_by_kind(graph: DependencyGraph, scores: Arrays) -> dict[str, np.ndarray]:
    return PerKind()(graph, z_scores(graph, scores))


def _same_number(graph: DependencyGraph, scores: Arrays) -> dict[str, np.ndarray]:
    sizes = defaultdict(list)
    for axis in graph.axes:
        sizes[axis.kind].append(axis.size)
    return at_levels(graph, scores, lambda axis: in_proportion(float(np.mean(sizes[axis.kind])) / axis.size))


STRUCTURES: dict[str, Callable[[DependencyGraph, Arrays], dict[str, np.ndarray]]] = {
    "AL-AM": z_scores,
    "AL-MM": _pooled_by_kind,
    "UL-UM": Uniform(),
    "UL-MM": _same_number,
}


@dataclass(frozen=True)
class Standardised:
    """FLAP's structures (METHODS.md 2.2), with a kind of axis for its "module" and a repeated axis for its "layer".

    AL-AM (all layers and modules, the default): z-scores of each axis, in one pool.
    AL-MM (all layers, each module): z-scores of each axis, in one pool for each kind; every kind loses the same share.
    UL-UM (each layer and module): every axis loses the same share of its groups.
    UL-MM (each layer, the same number): every kind loses the same share, and each of its axes the same number of groups.

    FLAP standardises over the channels before it averages those of a head; here the z-scores are those of groups. A scorer
    that standardises each member by itself, `Reduction("mean", within="mean", each="gaussian")`, is nearest to that. FLAP
    cuts where the cost kept is nearest to the target and drops the unit at the threshold as well; a plan meets the
    target exactly. The number of neurons of its MM formulas follows here from the exact cost.
    """

    structure: str = "AL-AM"

    def __post_init__(self) -> None:
        pick(STRUCTURES, self.structure, "structure")

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        return STRUCTURES[self.structure](graph, scores)
