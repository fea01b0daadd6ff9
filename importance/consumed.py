"""The parameter dims that are summed over with what flows in: the columns that a group has in its consumers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.consumers import Meeting
from depgraph.graph import Program, Value
from importance.consumers import Consumer, consumers_of
from importance.stored import AnyStored, stored_in


@dataclass(frozen=True)
class Columns:
    """A weight as it meets data, `weight` [..., channels], and the group of each channel for every axis.

    `parameter` and `dim` say which dim of the model that is, where it is a single one (else an empty name).
    """

    parameter: str
    dim: int
    labels: Mapping[str, np.ndarray] = field(repr=False)
    weight: Tensor = field(repr=False)

    def __str__(self) -> str:
        return f"parameter {self.parameter!r}" if self.parameter else "a weight that is computed"


def columns_of(graph: DependencyGraph) -> Iterator[Columns]:
    """The weights that sum over an axis's channels, computed ones (weight norm, parts of a packed one) as they are then.

    Of matrices that are chosen by indices, as those of experts, all are taken together. Where what is multiplied is computed
    from inputs (queries that meet keys), there are no weights.
    """
    stored = stored_in(graph)
    for consumer in consumers_of(graph):
        meeting = consumer.meetings[0]
        if not stored.counts(meeting.operand):
            yield from _columns(graph, consumer, stored)


def _columns(graph: DependencyGraph, consumer: Consumer, stored: AnyStored) -> Iterator[Columns]:
    meeting = consumer.meetings[0]
    node: Any = stored.node_of(meeting.other) if meeting.stored else None
    if node is not None:
        weight = _by_channel(consumer, stored.tensor(node).movedim(meeting.other_dim, -1))
        yield Columns(consumer.weight, consumer.weight_dim, consumer.labels, weight)
    for table, dim in _in_tables(graph, meeting, stored):
        yield Columns(table.target, dim, consumer.labels, stored.tensors[table.target].detach().movedim(dim, -1))


def _in_tables(graph: DependencyGraph, meeting: Meeting, stored: AnyStored) -> list[tuple[Value, int]]:
    """The parameter, and its dim, in whose rows the weights of a meeting are looked up, if they are."""
    program = graph.capture.program
    table = None if meeting.stored else stored.looked_up(meeting.other)
    if table is None:
        return []
    return [(table, dim) for dim in _alike(program, table, program.values[meeting.other].dim(meeting.other_dim))]


def _by_channel(consumer: Consumer, weight: Tensor) -> Tensor:
    """[..., channels]: every group of a convolution has rows and channels of its own."""
    own = weight.shape[-1]
    if own == consumer.size:
        return weight
    groups = consumer.size // own
    return weight.reshape(groups, -1, own).transpose(0, 1).reshape(-1, consumer.size)


def _alike(program: Program, table: Value, dim: int) -> list[int]:
    """The dim of a table that is the same as a dim of what was looked up in it; none where several are."""
    wanted = program.relations.find(dim)
    found = [d for d, at in enumerate(table.dims) if program.relations.find(at) == wanted]
    return found if len(found) == 1 else []
