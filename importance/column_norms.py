"""Mag-sp: the norms of the consumers' columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from depgraph.finite import require_finite
from importance.activation import with_unread
from importance.consumed import columns_of
from importance.layout import Layout
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec, Scored
from importance.sums import index_sums


@dataclass(frozen=True)
class ColumnNorm:
    """Mag-sp, of FLAP's authors (METHODS.md 2.4): the L2 norm, with its root, of the column that a channel meets.

    The paper's are the columns of the output projection of an attention and of the last linear map of an MLP; here those of
    every weight that sums over the axis, whatever the operator: for a convolution, over its window too. The channels of a
    group are summed (a head), then its consumers. An axis that no weight sums over has no such scores: it goes last, by the
    size of its weights.

    Args:
        reduction: over consumers: a name, a function or a `Reduction`, which also says how channels are joined.
        normalise: per axis.

    Raises ScoreError for an unknown name; when called, for NaN or infinite weights, by name.
    """

    comparable: ClassVar[bool] = False

    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"

    def __post_init__(self) -> None:
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_finite(graph.model, ScoreError)
        Layout.of(graph)  # refuses weights without values, and those that have changed since
        members: dict[str, list[Scored]] = {axis.name: [] for axis in graph.axes}
        for columns in columns_of(graph):
            norms = _norms(columns.weight)
            for axis, labels in columns.labels.items():
                members[axis].append((labels, norms))
        reduction, normalisation = Reduction.of(self.reduction), Normalisation.of(self.normalise)
        scores = {name: normalisation(reduction(read, graph[name].size)) for name, read in members.items() if read}
        return with_unread(graph, scores)


def _norms(weight: Tensor) -> np.ndarray:
    """[channels], of a weight [..., channels]."""
    last = weight.ndim - 1
    squares = index_sums(lambda w: w.abs().square(), (weight,), (last,))[last]
    found: np.ndarray = squares.sqrt().cpu().double().numpy()
    return found
