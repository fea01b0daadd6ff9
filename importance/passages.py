"""Where a residual stream comes into a block and leaves it, found from the captured program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from depgraph import DependencyGraph
from depgraph.graph import Value
from depgraph.joins import name_of
from depgraph.paths import is_in

_COMPUTED = ("input", "activation")
_ADDS = ("add", "add_")


@dataclass(frozen=True)
class Passage:
    """The values, by name, that come into a block and leave it on its residual stream, and which of their dims the channels are."""

    block: str
    enters: str
    leaves: str
    channels: int


def passages(graph: DependencyGraph, blocks: Iterable[str]) -> Iterator[Passage]:
    """The passage of every block, by module path, that puts out something of the shape of what comes in; in their order.

    What leaves is the last such value that is read outside. What comes in is of its shape and is added to something within the
    block, or else the first of its shape.
    """
    values = graph.capture.program.values
    computed = {n: values[n.name] for n in graph.nodes if _is_computed(n, values.get(n.name))}
    for block in blocks:
        inside = {n for n, value in computed.items() if n.op == "call_function" and is_in(value.module, block)}
        read = {n for node in inside for n in node.all_input_nodes}
        coming = [n for n in computed if n in read and n not in inside]
        for last in reversed([n for n in computed if n in inside and not inside.issuperset(n.users)]):
            fits = [n for n in coming if computed[n].shape == computed[last].shape]
            if fits:
                first = next((n for n in fits if any(map(_adds, inside.intersection(n.users)))), fits[0])
                yield Passage(block, first.name, last.name, _channels(graph, computed[last]))
                break


def _is_computed(node: Node, value: Value | None) -> bool:
    """Is it a tensor of floats with dims that depends on inputs?"""
    made = node.meta.get("val")
    floats = isinstance(made, torch.Tensor) and made.ndim > 0 and made.is_floating_point()
    return floats and value is not None and value.kind in _COMPUTED


def _adds(node: Node) -> bool:
    return name_of(node) in _ADDS


def _channels(graph: DependencyGraph, value: Value) -> int:
    """The dim of a value that an axis reaches; the last where none does, or several do."""
    reached = [d for d in range(len(value.shape)) if graph.widths.axes_of(value.dim(d))]
    return reached[0] if len(reached) == 1 else len(value.shape) - 1
