"""The weights that a consumer multiplies with, as matrices [outputs, columns], and which columns a group has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depgraph.classes import NONE
from importance.consumers import Consumer
from importance.statistics import Statistics


@dataclass(frozen=True)
class Block:
    """A matrix [outputs, columns] and the columns [start, stop) of the consumer's that it multiplies."""

    matrix: Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.matrix.shape[1]


def blocks_of(consumer: Consumer, weight: Tensor, columns: int) -> Iterator[Block]:
    """The parameter of a consumer as matrices with `columns` columns together: one, or one for each group of a convolution.

    A channel has as many columns as a convolution's window is large, one after the other; without windows, all of the
    parameter's dims but the one that is summed over are rows.
    """
    windowed = columns > consumer.size
    matrix = weight.flatten(1) if windowed else weight.movedim(consumer.weight_dim, -1).flatten(0, -2)
    groups = columns // matrix.shape[1]
    if groups < consumer.groups:  # a transposed convolution's weight has all channels beside one another
        own = columns // consumer.groups
        yield from (Block(part, group * own) for group, part in enumerate(matrix.split(own, dim=1)))
        return
    outputs = matrix.shape[0] // groups
    for group in range(groups):
        yield Block(matrix[group * outputs : (group + 1) * outputs], group * matrix.shape[1])


def as_weight(consumer: Consumer, blocks: list[Block], like: Tensor) -> Tensor:
    """The parameter that `blocks_of` laid out so, in its own shape, from other matrices of the same sizes."""
    across = consumer.groups > 1 and like.shape[consumer.weight_dim] == consumer.size
    matrix = torch.cat([block.matrix for block in blocks], dim=1 if across else 0)
    if len(matrix[0]) == like[0].numel() and like.ndim > 2 and consumer.weight_dim == 1:
        return matrix.reshape(like.shape).to(like)
    moved = like.movedim(consumer.weight_dim, -1)
    return matrix.reshape(moved.shape).movedim(-1, consumer.weight_dim).to(like)


def column_labels(consumer: Consumer, axis: str, columns: int) -> np.ndarray:
    """The group of every column, -1 for none: every channel has as many columns as the window is large."""
    return np.repeat(consumer.labels[axis], columns // consumer.size)


def present_groups(labels: np.ndarray) -> np.ndarray:
    """The groups that labels name, ascending."""
    found = np.unique(labels)
    return found[found != NONE]


def weight_of(consumer: Consumer, found: Statistics) -> Tensor | None:
    """The parameter that a consumer multiplies with, in no other order than its own; None where it is no single one."""
    return found.graph.tensor(consumer.weight).detach() if consumer.weight else None
