"""A model with products on the edges where its residual streams pass from one basis to another, as SliceGPT's shortcuts do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

import depgraph
from depgraph import DependencyGraph
from depgraph.cutting.hook_weights import plain_copy
from depgraph.cutting.inserting import Product, untie, with_products
from depgraph.errors import CutError, RotationError
from importance.parting import Parted, parted
from importance.units import units


@dataclass(frozen=True)
class Shortcuts:
    """A graph whose streams are parted by products, the axes that can have a basis of their own, the names of the products'
    weights, and what to know of it."""

    graph: DependencyGraph
    axes: tuple[str, ...]
    products: frozenset[str]
    notes: tuple[str, ...]


def with_shortcuts(graph: DependencyGraph, ties: str = "untie") -> Shortcuts:
    """A graph form of a graph's model whose residual streams are parted; it computes what the model does.

    `ties`: one of `folding.TIES`; "keep" leaves stretches that share a weight in one basis. Streams that can't be parted stay.

    Raises:
        NothingToPrune: the model has no residual stream that may lose a channel.
        RotationError: none has a stretch that could be rotated (the message names the place), or the model has no graph form.
    """
    whole = _lifted(graph, graph.model)
    changing = frozenset(graph.free) & frozenset(graph.capture.program.by_products)
    parts, notes = _parts(whole, ties, changing)
    untied = tuple(dict.fromkeys(name for part in parts for name in part.untied))
    if untied:
        apart = plain_copy(graph.model, {})
        untie(apart, untied)
        whole = _lifted(graph, apart)
        parts, notes = _parts(whole, ties, changing)
    products = [product for part in parts for product in part.products]
    try:
        model, sizes = with_products(whole, products, untied)
    except CutError as error:
        raise RotationError(f"no products can be put between the bases of {graph.name}: {error}") from error
    again = traced_again(graph, model)
    notes += [f"{name} is a weight of its own now: what it was tied to has another basis" for name in untied]
    names = frozenset(map(Product.weight, range(len(products))))
    return Shortcuts(again, tuple(dict.fromkeys(_axes(again, parts))), names, (*notes, *sizes))


def _lifted(graph: DependencyGraph, model: nn.Module) -> DependencyGraph:
    """The same example on a model, of which all outputs may change: those that mustn't will come through products."""
    return depgraph.trace(model, graph.args, graph.kwargs, free=list(graph.capture.program.outputs))


def _parts(graph: DependencyGraph, ties: str, changing: frozenset[str]) -> tuple[list[Parted], list[str]]:
    """How the streams can be parted, and notes on those that can't; raises RotationError where none can."""
    found, refused = list[Parted](), list[RotationError]()
    for axis in units(graph, "stream"):
        try:
            found.append(parted(graph, axis, ties, changing))
        except RotationError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found, [str(error) for error in refused]


def _axes(graph: DependencyGraph, parts: list[Parted]) -> Iterator[str]:
    """The axes of the stretches."""
    ties, before = graph.capture.program.ties, 0
    axes = {(ties.get(m.target, m.target), m.dim): axis.name for axis in graph.axes for m in axis.members}
    for part in parts:
        for where, dim in part.stretches:
            name = Product.weight(before + where) if isinstance(where, int) else ties.get(where, where)
            if (name, dim) in axes:
                yield axes[name, dim]
        before += len(part.products)


def traced_again(graph: DependencyGraph, model: nn.Module) -> DependencyGraph:
    """The same example and the same freedoms, on another model."""
    program = graph.capture.program
    free = [name for name in program.outputs if name in graph.free]
    fixed = [name for name in program.by_products if name not in graph.free]
    return depgraph.trace(model, graph.args, graph.kwargs, free=free, fixed=fixed)
