"""Column norms of the weights that read a group: Wanda-sp without the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.activation import with_unread
from importance.consumed import Columns, columns_of
from importance.layout import Layout
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec, Scored
from importance.sums import index_sums


@dataclass(frozen=True)
class ColumnMagnitude:
    """Mag-sp (METHODS.md 2.4): the L2 norm, with its root, of a channel's column of every weight that reads it.

    The columns of a group (a head) are summed, then (by default) the weights. A weight that is computed (a weight norm, a part
    of a packed one) counts as it is when it meets data, and of matrices that are chosen by indices, as those of experts, all
    count together. An axis that no weight reads has no such scores: it goes last, by the size of its own weights.

    Args:
        reduction: over the weights that read an axis: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.

    Raises ScoreError: for an unknown name, at once; when called, for weights that are NaN or infinite.
    """

    comparable: ClassVar[bool] = False

    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"

    def __post_init__(self) -> None:
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        Layout.of(graph)  # refuses weights without values, and those that have changed since
        members: dict[str, list[Scored]] = {axis.name: [] for axis in graph.axes}
        for columns in columns_of(graph):
            norms = _norms(columns)
            for axis, labels in columns.labels.items():
                members[axis].append((labels, norms))
        reduction, normalisation = Reduction.of(self.reduction), Normalisation.of(self.normalise)
        scores = {name: normalisation(reduction(read, graph[name].size)) for name, read in members.items() if read}
        return with_unread(graph, scores)


def _norms(columns: Columns) -> np.ndarray:
    """One number per channel, float64."""
    last = columns.weight.ndim - 1
    squares = index_sums(lambda w: w.abs().square(), (columns.weight,), (last,))[last]
    norms: np.ndarray = squares.sqrt().cpu().double().numpy()
    if not np.isfinite(norms).all():
        raise ScoreError(f"{columns} holds NaN or infinite values: repair or reload the weights before scoring")
    return norms
