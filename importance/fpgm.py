"""Distances between filters: one that lies near to all others of its layer can be made up for by these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.classes import NONE
from depgraph.errors import ScoreError
from importance.consumers import consumers_of
from importance.layout import Layout, Place
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec, Scored

PIECE = 1 << 22
"""Numbers of a block of distances, or of the slices they are computed from, that are held at once."""


@dataclass(frozen=True)
class FilterDistance:
    """FPGM (METHODS.md 2.4): the sum of the Euclidean distances from a group's slice of a weight to all others'.

    Slices are of the raw weights that make a group's channels: a parameter of two dims or more, cut along the group's
    indices; what reads the channels isn't looked at, nor are biases and scales, unless an axis has nothing else. Of the
    rows of a group (a head), the first is compared with the first of the others, and so on; missing ones count as zero.
    By default the parameters of a group are averaged and the scores of each axis divided by their mean.

    Distances come from inner products in float64, a block at a time: those below 1e-8 of a slice's norm are noise.

    Args:
        reduction: over members: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.

    Raises ScoreError: for an unknown name, at once; when called, for weights that are NaN, infinite or without values.
    """

    comparable: ClassVar[bool] = False

    reduction: ReductionSpec = "mean"
    normalise: NormalisationSpec = "mean"

    def __post_init__(self) -> None:
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        layout = Layout.of(graph)
        read = {(consumer.weight, consumer.weight_dim) for consumer in consumers_of(graph)}
        reduction, normalisation = Reduction.of(self.reduction), Normalisation.of(self.normalise)
        scores = {}
        for name, places in layout.places.items():
            chosen = _filters(places, layout, read)
            members = [_scored(layout.parameters[place.parameter], place) for place in chosen]
            scores[name] = normalisation(reduction(members, layout.sizes[name]))
        return scores


def _filters(places: tuple[Place, ...], layout: Layout, read: set[tuple[str, int]]) -> list[Place]:
    """The places that hold the weights of an axis's channels; else those with more than one dim; else all."""
    large = [place for place in places if layout.parameters[place.parameter].ndim > 1]
    made = [place for place in large if (place.parameter, place.dim) not in read]
    return made or large or list(places)


def _scored(weight: Tensor, place: Place) -> Scored:
    groups, table = indices_of(place.labels)
    found = distance_sums(weight.detach(), place.dim, torch.from_numpy(table).to(weight.device)).cpu().double().numpy()
    if not np.isfinite(found).all():
        raise ScoreError(
            f"parameter {place.parameter!r} holds NaN or infinite values: repair or reload the weights before scoring"
        )
    return groups, found


def indices_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The groups that labels name, and the indices of each [groups, most indices of one], -1 where it has no more."""
    groups = np.unique(labels[labels != NONE])
    members = [np.flatnonzero(labels == group) for group in groups]
    table = np.full((len(groups), max(map(len, members), default=0)), NONE)
    for row, found in enumerate(members):
        table[row, : len(found)] = found
    return groups, table


@torch.no_grad()
def distance_sums(weight: Tensor, dim: int, table: Tensor) -> Tensor:
    """For every row of `table` [slices, indices] (-1: none), its slice's distances to all others, summed: [slices]."""
    moved = in_front(weight, dim)
    step = max(1, PIECE // max(len(table), 1))
    sums = [_block(moved, table, at, step) for at in range(0, len(table), step)]
    return torch.cat(sums) if sums else weight.new_zeros(0)


def in_front(weight: Tensor, dim: int) -> Tensor:
    """A real tensor with `dim` as its first."""
    return (torch.view_as_real(weight) if weight.is_complex() else weight).movedim(dim, 0)


def _block(moved: Tensor, table: Tensor, start: int, step: int) -> Tensor:
    here = slice(start, start + step)
    inner, norms = torch.zeros(()), torch.zeros(())
    for part in slices(moved, table):
        inner = part[here] @ part.T + inner.to(part)
        norms = part.square().sum(dim=1) + norms.to(part)
    squares = (norms[here, None] + norms[None] - 2 * inner).clamp_(min=0)
    squares.diagonal(offset=start).zero_()
    return squares.sqrt_().sum(dim=1)


def slices(moved: Tensor, table: Tensor) -> Iterator[Tensor]:
    """The slices [slices, numbers], so many of their numbers at a time that memory stays bounded."""
    if moved.ndim == 1:
        moved = moved[:, None]
    along = max(range(1, moved.ndim), key=lambda d: moved.shape[d])
    wide = torch.float32 if moved.device.type == "mps" else torch.float64
    each = table.numel() * moved[0].numel() // max(moved.shape[along], 1)
    present = (table != NONE)[..., None]
    for part in moved.split(max(1, PIECE // max(each, 1)), dim=along):
        flat = part.flatten(1)
        yield (flat[table.clamp(min=0)].to(wide) * present).flatten(1)
