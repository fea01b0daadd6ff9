"""What a router chooses: the indices of several of the experts of an axis at a time, as a top-k gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.capture.deciding import Asked
from depgraph.capture.exported import CapturedProgram, decisions_of
from depgraph.errors import DataError, ScoreError
from depgraph.graph import Value
from depgraph.operators import operator_name


class Place(NamedTuple):
    """Where a forward that decides by values chooses: in which module, and as which of the choices that are made there."""

    module: str
    number: int


class Choice(NamedTuple):
    """The name of what holds the indices that were chosen, and the group of every index that it may hold, -1 for none.

    `place` is None where an operator of the captured graph makes it.
    """

    made: str
    labels: np.ndarray
    place: Place | None


def choice_of(graph: DependencyGraph, axis: str) -> Choice:
    """The last choice among the indices of an axis. Raises ScoreError where no top-k chooses several at a time."""
    values, exported = graph.capture.program.values, graph.capture.exported
    for place, asked in reversed(list(_decided(exported))):
        value = values.get(asked.gives)
        if value is not None and _is_among(graph, axis, value):
            return Choice(asked.gives, _labels(graph, axis, value), place)
    for node in reversed(list(exported.graph.nodes)):
        value = values.get(node.name)
        made_by = node.all_input_nodes[0].target if node.all_input_nodes else None
        if value is not None and operator_name(made_by) == "topk" and _is_among(graph, axis, value):
            return Choice(node.name, _labels(graph, axis, value), None)
    raise ScoreError(f"no top-k chooses several of the experts of axis {axis!r} at a time: take coactivation=0")


def decided_at(exported: CapturedProgram, place: Place) -> Tensor:
    """The indices that were chosen there in a capture of a batch. Raises DataError where nothing was."""
    names = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs}
    found = next((names.get(asked.gives) for there, asked in _decided(exported) if there == place), None)
    chosen = exported.constants.get(found or "")
    if not isinstance(chosen, Tensor):
        raise DataError(
            f"nothing is chosen in {place.module!r} on a batch, as is on the example: trace the model on such a batch"
        )
    return chosen


def _decided(exported: CapturedProgram) -> Iterator[tuple[Place, Asked]]:
    """The choices that a forward has made by values, in order."""
    decisions, counts = decisions_of(exported), dict[str, int]()
    for asked in () if decisions is None else decisions.asked:
        if asked.gives and asked.operator.split(".")[1:2] == ["topk"]:
            number = counts.get(asked.module, 0)
            counts[asked.module] = number + 1
            yield Place(asked.module, number), asked


def _is_among(graph: DependencyGraph, axis: str, value: Value) -> bool:
    return value.shape[-1:] > (1,) and value.domain is not None and axis in graph.widths.axes_of(value.domain)


def _labels(graph: DependencyGraph, axis: str, value: Value) -> np.ndarray:
    found: np.ndarray = graph[axis].labels[graph.widths.class_of(value.domain)]  # type: ignore[arg-type]
    return found
