"""Calibration batches, each with the way that the model takes on inputs of its shapes; and windows of a text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import depgraph
from depgraph import DependencyGraph
from depgraph.capture.exported import decisions_of
from depgraph.errors import DataError, DepgraphError, no_batches
from depgraph.observing import shapes_of
from depgraph.onnx_door.graph import OnnxGraph
from importance.calling import check_batches, device_of, inputs_of, moved
from importance.depth.files import FileWay
from importance.depth.programs import Way


class Given(NamedTuple):
    """A batch on the model's device, the tensors that it hands to the model, in order, and the way that these take."""

    batch: Any
    leaves: list[Any]
    way: Way | FileWay


def given(graph: DependencyGraph, batches: Iterable[Any], names: Iterable[str]) -> list[Given]:
    """All batches, for branches and blocks of these names. The model is captured once for all batches of the same shapes.

    Raises DataError when there are none, one is empty or doesn't fit the model, or the model takes a way on it where one of
    the names can't be left out.
    """
    check_batches(batches)
    if isinstance(graph, OnnxGraph):
        file = FileWay(graph, names)
        found = [Given(moved(batch, torch.device("cpu")), file.given(batch), file) for batch in batches]
    else:
        found = _captured(graph, batches, list(names))
    if not found:
        raise no_batches("to score with")
    return found


def _captured(graph: DependencyGraph, batches: Iterable[Any], names: list[str]) -> list[Given]:
    """All batches, each with a capture for its shapes."""
    device = device_of(graph.tensors().values())
    own = {} if _by_values(graph) else {shapes_of(graph.args, graph.kwargs): Way(graph, names)}
    found = []
    for batch in (moved(batch, device) for batch in batches):
        if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in pytree.tree_leaves(batch)):
            raise DataError("a batch is empty: one of its tensors has no elements, give batches with samples in them")
        args, kwargs = _inputs(graph, batch)
        key = shapes_of(args, kwargs)
        way = own[key] if key in own else Way(_traced(graph, args, kwargs), names)
        if not _by_values(graph):
            own[key] = way
        found.append(Given(batch, pytree.tree_leaves((args, kwargs)), way))
    return found


def windows(tokens: Tensor, length: int, count: int, *, batch: int = 1) -> list[dict[str, Tensor]]:
    """The first `count` windows of `length` tokens of a text [tokens], as batches `{"input_ids": [batch, length]}`.

    Raises DataError when the text is shorter than one window.
    """
    whole = len(tokens) // length
    if not whole:
        raise DataError(f"the text has {len(tokens)} tokens, less than one window of {length}: give more text")
    rows = tokens[: whole * length].reshape(whole, length)[:count]
    return [{"input_ids": rows[k : k + batch]} for k in range(0, len(rows), batch)]


def _by_values(graph: DependencyGraph) -> bool:
    """Does the model take its way by the values of the inputs, not by their shapes?"""
    decisions = decisions_of(graph.capture.exported)
    return decisions is not None and not decisions.settled


def _inputs(graph: DependencyGraph, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch the model is called with, labels too if it takes any."""
    args, kwargs = inputs_of(graph.model, batch)
    if isinstance(batch, Mapping) and "labels" in batch:
        takes = inspect.signature(graph.model.forward).parameters
        kwargs = {**kwargs, "labels": batch["labels"]} if "labels" in takes else kwargs
    return args, kwargs


def _traced(graph: DependencyGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DependencyGraph:
    try:
        return depgraph.trace(graph.model, args, kwargs)
    except DepgraphError as error:
        raise DataError(f"a batch doesn't fit {graph.name}: {error}") from error
