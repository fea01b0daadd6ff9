"""Column norms of the weights that read a group: Wanda-sp without the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.activation import with_unread
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec, Scored
from importance.statistics import Consumer, consumers_of


@dataclass(frozen=True)
class ColumnMagnitude:
    """Mag-sp (METHODS.md 2.4): the L2 norm, with its root, of a channel's column of every weight that reads it.

    The columns of a group (a head) are summed, then (by default) the weights. An axis that no weight reads has no such
    scores: it goes last, by the size of its own weights.

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
        tensors = graph.tensors()
        members: dict[str, list[Scored]] = {axis.name: [] for axis in graph.axes}
        for consumer in consumers_of(graph):
            if consumer.weight:
                norms = _norms(consumer, tensors[consumer.weight])
                for axis, labels in consumer.labels.items():
                    members[axis].append((labels, norms))
        reduction, normalisation = Reduction.of(self.reduction), Normalisation.of(self.normalise)
        scores = {name: normalisation(reduction(read, graph[name].size)) for name, read in members.items() if read}
        return with_unread(graph, scores)


@torch.no_grad()
def _norms(consumer: Consumer, weight: Tensor) -> np.ndarray:
    """One number per channel, float64; every group of a convolution has channels of its own."""
    moved = weight.detach().movedim(consumer.weight_dim, -1)
    own = moved.shape[-1]
    rows = moved.reshape(consumer.size // own, -1, own)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=_wider(weight.dtype)).flatten().cpu().double().numpy()
    if not np.isfinite(norms).all():
        raise ScoreError(
            f"parameter {consumer.weight!r} holds NaN or infinite values: repair or reload the weights before scoring"
        )
    return norms


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
