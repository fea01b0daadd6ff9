"""Consumers of axes: dims that operators sum over (`depgraph.consumers`), what a removed group no longer feeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.consumers import Meeting, meetings
from depgraph.errors import ScoreError
from importance.patches import groups_of

Key = tuple[str, int]


@dataclass(frozen=True)
class Consumer:
    """A dim that operators sum over: all that meets one dim of one parameter, or what meets in one operator.

    `size` is the number of channels that come in; `labels` says for each axis which group every channel belongs to, -1 for
    none. `weight` and `weight_dim` are the parameter that the channels are multiplied with; empty where that is no single one.
    `groups` is how many parts of the channels, one after the other, go into outputs of their own, as a convolution's do.
    """

    key: Key
    meetings: tuple[Meeting, ...]
    size: int
    labels: Mapping[str, np.ndarray] = field(repr=False)
    groups: int = 1

    @property
    def weight(self) -> str:
        return self.meetings[0].weight

    @property
    def weight_dim(self) -> int:
        return self.meetings[0].weight_dim

    def __str__(self) -> str:
        return str(self.meetings[0])


_KNOWN: WeakKeyDictionary[DependencyGraph, list[Consumer]] = WeakKeyDictionary()


def consumers_of(graph: DependencyGraph) -> list[Consumer]:
    """All consumers of a graph's axes, in the order in which the model computes; found once."""
    if graph not in _KNOWN:
        _KNOWN[graph] = _found(graph)
    return list(_KNOWN[graph])


def _found(graph: DependencyGraph) -> list[Consumer]:
    program = graph.capture.program
    found: dict[Key, list[Meeting]] = defaultdict(list)
    for meeting in meetings(program, graph.nodes):
        found[meeting.key].append(meeting)
    groups = {node.name: groups_of(node) for node in graph.nodes}
    consumers = []
    for key, here in found.items():
        dim = program.values[here[0].operand].dim(here[0].dim)
        number = graph.widths.class_of(dim)
        labels = {name: graph[name].labels[number] for name in graph.widths.axes_of(dim)}
        if labels:
            slid_over = here[0].weight and not here[0].second
            size, parts = program.relations.sizes[dim], groups[here[0].op] if slid_over else 1
            consumers.append(Consumer(key, tuple(here), size, labels, parts or 1))
    return consumers


def channel_scores(consumer: Consumer, values: Tensor) -> np.ndarray:
    """One number per channel of a consumer, float64, checked to be as many as it has."""
    array = values.detach().cpu().double().numpy()
    if array.shape != (consumer.size,):
        raise ScoreError(f"{consumer} has {consumer.size} channels, but a score has shape {array.shape}")
    return array
