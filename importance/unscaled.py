"""Copies of a model whose normalisations have no scales, so that its residual streams can be turned: with one basis, or several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.cutting.hook_weights import plain_copy
from depgraph.errors import RotationError
from importance.folding import Folded, fold, put
from importance.shortcuts import traced_again, with_shortcuts
from importance.stream_parts import Stream
from importance.streams import stream_of
from importance.units import units


@dataclass(frozen=True)
class Unscaled:
    """A graph of a copy whose normalisations have no scales, what it must compute on the example, and its streams by axis.

    `products`: the names of weights that were put between the streams. `notes`: what to know of it.
    """

    graph: DependencyGraph
    expected: list[Tensor]
    streams: dict[str, Stream]
    products: frozenset[str]
    notes: tuple[str, ...]


def _one(graph: DependencyGraph, ties: str) -> Unscaled:
    """The model as it is."""
    folded = fold(graph, [stream_of(graph, axis) for axis in units(graph, "stream")], ties)
    again, expected = _folded_copy(graph, folded)
    return Unscaled(
        again, expected, {axis: stream_of(again, axis) for axis in units(again, "stream")}, frozenset(), _told(folded)
    )


def _each(graph: DependencyGraph, ties: str) -> Unscaled:
    """Its graph form, with products where a stream passes from one basis to the next."""
    begun = with_shortcuts(graph, ties)
    folded = fold(begun.graph, [stream_of(begun.graph, axis) for axis in begun.axes], ties)
    put(begun.graph.model, folded.tensors, folded.untied)
    expected = outputs(begun.graph if folded.flattened else graph)
    streams = {axis: stream_of(begun.graph, axis) for axis in begun.axes}
    return Unscaled(begun.graph, expected, streams, begun.products, (*begun.notes, *_told(folded)))


BASES: dict[str, Callable[[DependencyGraph, str], Unscaled]] = {"one": _one, "each": _each}
"""One rotation for a whole stream; or one for each normalisation, with products on the residual paths between them."""


def _told(folded: Folded) -> tuple[str, ...]:
    notes = [f"{name} is a weight of its own now: a scale was multiplied into it" for name in folded.untied]
    notes += [f"{name} has its mean for all channels now: its reader is a table too" for name in folded.flattened]
    return tuple(notes)


def _folded_copy(graph: DependencyGraph, folded: Folded) -> tuple[DependencyGraph, list[Tensor]]:
    """The graph of a copy with other tensors, and what it computes on the example."""
    model = plain_copy(graph.model, {})
    put(model, folded.tensors, folded.untied)
    again = traced_again(graph, model)
    if folded.flattened:
        return again, outputs(again)
    expected = outputs(graph)
    config: Any = getattr(model, "config", None)
    if folded.untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # a library that reads it would tie the weights again
        told = traced_again(graph, model)
        try:
            require_same(expected, told)
            return told, expected
        except (RotationError, ValueError):
            config.tie_word_embeddings = True  # it decides on something else, too
    return again, expected


def require_same(expected: list[Tensor], turned: DependencyGraph) -> None:
    """Raise RotationError unless a model computes what is expected on the example, up to rounding; by-products may differ."""
    eps = torch.finfo(torch.float32).eps
    for one, other in zip(expected, outputs(turned), strict=True):
        error, size = float((one.double() - other.double()).abs().max()), float(one.abs().max())
        if not error <= 4 * math.sqrt(max(torch.finfo(one.dtype).eps, eps)) * max(size, eps):
            raise RotationError(
                f"{type(turned.model).__name__} computes something else after its residual streams were rotated (error "
                f"{error:.1e} of {size:.1e}): something acts on their channels that the graph doesn't show; prune them by another score"
            )


def outputs(graph: DependencyGraph) -> list[Tensor]:
    """What a graph's model puts out for the example, but for by-products."""
    program = graph.capture.program
    free = {value.name for name, value in program.outputs.items() if name in program.by_products}
    made = graph.observer().run((graph.args, graph.kwargs))
    return [x for value, x in made if value.name not in free and x.is_floating_point() and x.numel()]
