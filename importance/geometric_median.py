"""FPGM: filters near the geometric median of their layer are those that the others can stand in for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.coupling import NONE
from depgraph.errors import ScoreError
from depgraph.finite import require_finite
from importance.consumed import consumed_dims
from importance.layout import Layout, Place
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec, Scored

_BLOCK = 1 << 23
"""Elements of the largest piece of filters that is held in float64."""


@dataclass(frozen=True)
class GeometricMedian:
    """Sum over k of ||w_i - w_k||_2, of the raw weights (He et al. 2019; METHODS.md 2.4).

    The filter of a group is what it has of one parameter: the slices at its indices, laid out in a row. Filters of a parameter
    are compared with each other, and the sums of distances joined over parameters. Only parameters of two dims or more that
    make the axis's channels count, as in the paper; the columns of consumers, biases and scales where there are no others. Note
    that a filter of zeros isn't the lowest: redundancy isn't smallness.

    Costs the square of the number of groups times the size of the filters, in float64; memory is bounded, whatever the sizes.

    Args:
        reduction: over parameters: a name, a function or a `Reduction`.
        normalise: per axis.

    Raises ScoreError for an unknown name; when called, for NaN or infinite weights, by name.
    """

    comparable: ClassVar[bool] = False

    reduction: ReductionSpec = "mean"
    normalise: NormalisationSpec = "mean"

    def __post_init__(self) -> None:
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_finite(graph.model, ScoreError)
        layout = Layout.of(graph)
        read = consumed_dims(graph)
        reduction, normalisation = Reduction.of(self.reduction), Normalisation.of(self.normalise)
        scores = {}
        for axis, places in layout.places.items():
            makers = [p for p in places if _makes(p, layout.parameters[p.parameter], read)] or places
            members = [_scored(place, layout.parameters[place.parameter]) for place in makers]
            scores[axis] = normalisation(reduction(members, layout.sizes[axis]))
        return scores


def _makes(place: Place, parameter: Tensor, read: set[tuple[int, int]]) -> bool:
    """Are these the filters of a layer that makes the channels?"""
    return parameter.ndim > 1 and (id(parameter), place.dim) not in read


def _scored(place: Place, parameter: Tensor) -> Scored:
    """The groups that have a filter here, and their sums of distances."""
    groups = np.unique(place.labels[place.labels != NONE])
    return groups, distance_sums(Filters.of(place, parameter.detach(), groups))


@dataclass(frozen=True)
class Filters:
    """The slices of a tensor along `dim` at `indices` [filters, slices each]; -1 stands for one of zeros."""

    tensor: Tensor
    dim: int
    indices: Tensor

    @classmethod
    def of(cls, place: Place, tensor: Tensor, groups: np.ndarray) -> Filters:
        """One filter for each of the `groups`; where some have fewer slices than others, they end in zeros."""
        found = [np.flatnonzero(place.labels == group) for group in groups]
        table = np.full((len(found), max(map(len, found), default=0)), -1)
        for row, indices in zip(table, found, strict=True):
            row[: len(indices)] = indices
        return cls(tensor, place.dim, torch.from_numpy(table).to(tensor.device))

    @property
    def width(self) -> int:
        """The number of elements of a filter."""
        return self.indices.shape[1] * self.tensor.numel() // max(self.tensor.shape[self.dim], 1)

    def block(self, start: int, stop: int) -> Tensor:
        """Filters [stop - start, width] in float64 (float32 where the device has none); complex ones as pairs."""
        wanted = self.indices[start:stop]
        slices = self.tensor.index_select(self.dim, wanted.clamp(min=0).flatten()).movedim(self.dim, 0)
        slices = torch.view_as_real(slices) if slices.is_complex() else slices
        rows = slices.to(torch.float32 if slices.device.type == "mps" else torch.float64).reshape(wanted.numel(), -1)
        rows[wanted.flatten() < 0] = 0
        return rows.reshape(len(wanted), -1)


def distance_sums(filters: Filters) -> np.ndarray:
    """For each filter the sum of its Euclidean distances to all others, float64 [filters]; a pair of blocks at a time."""
    count = len(filters.indices)
    step = max(1, min(count, _BLOCK // max(filters.width, count, 1)))
    sums = torch.zeros(count, dtype=torch.float64)
    for start in range(0, count, step):
        rows = filters.block(start, start + step)
        for other in range(start, count, step):
            columns = rows if other == start else filters.block(other, other + step)
            apart = torch.cdist(rows, columns)
            if other == start:
                apart.fill_diagonal_(0)
            else:
                sums[other : other + step] += apart.sum(dim=0).cpu()
            sums[start : start + step] += apart.sum(dim=1).cpu()
    found: np.ndarray = sums.numpy()
    return found
