"""Operators that write into a tensor they are given, and whose memory that is."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch.fx import Node


class Write(NamedTuple):
    """An operator in place, and the node that made the memory it writes to (itself, or through views)."""

    writer: Node
    root: Node


def writes(nodes: Iterable[Node]) -> list[Write]:
    """All writes of a captured graph."""
    return [Write(node, _root(target)) for node in nodes for target in _written(node)]


def _written(node: Node) -> Iterator[Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for k, declared in enumerate(schema.arguments):
        given = node.args[k] if k < len(node.args) else node.kwargs.get(declared.name)
        if declared.alias_info is not None and declared.alias_info.is_write:
            yield from (
                one for one in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(one, Node)
            )


def _root(node: Node) -> Node:
    """The node that made the memory of what `node` made."""
    while (base := _base(node)) is not None:
        node = base
    return node


def _base(node: Node) -> Node | None:
    """What `node` is a view of, as far as its operator says; None where it makes memory of its own."""
    if node.target is operator.getitem:
        first: Any = node.args[0]
        return first if isinstance(first, Node) else None
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(made.alias_info is not None for made in schema.returns):
        return None
    return next((n for n in node.args if isinstance(n, Node)), None)
