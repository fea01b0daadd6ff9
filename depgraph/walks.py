"""Walks over what leads to what, such as from an operator to those that it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch.fx import Node

T = TypeVar("T")


def reached(start: Iterable[T], onward: Callable[[T], Iterable[T]]) -> dict[T, None]:
    """All that a way leads to from `start`, these included, each once, in the order in which it is found."""
    found = dict.fromkeys(start)
    left = list(found)
    while left:
        for other in onward(left.pop()):
            if other not in found:
                found[other] = None
                left.append(other)
    return found


def behind(nodes: Iterable[Node]) -> dict[Node, None]:
    """Nodes of a captured graph and all that they are computed from."""
    return reached(nodes, lambda node: node.all_input_nodes)


def ahead(nodes: Iterable[Node], starts: Callable[[Node], bool]) -> set[Node]:
    """Those of `nodes`, which come in the order of execution, that start a way, and that are computed from such."""
    found: set[Node] = set()
    for node in nodes:
        if starts(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def moving(nodes: Iterable[Node], values: Mapping[str, Any]) -> set[Node]:
    """The inputs of a captured graph, and what is computed from them; `values` are its `Program.values`."""

    def enters(node: Node) -> bool:
        value = values.get(node.name)
        return node.op == "placeholder" and (value is None or value.kind == "input")

    return ahead(nodes, enters)
