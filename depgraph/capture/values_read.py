"""Which operators' numbers are read: by an output, a write or a decision. Of others the code reads the shape at most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from depgraph.operators import without_overload, writes
from depgraph.rules.domains import LOOKS_AT_SHAPES
from depgraph.walks import reached

_SHAPE_OF_SECOND = frozenset(
    f"aten.{name}" for name in ("expand_as", "view_as", "reshape_as", "type_as", "resize_as", "resize_as_")
)


def values_read(nodes: Iterable[Node], asked: Iterable[str]) -> frozenset[Node]:
    """The nodes whose numbers an output is computed from, a write takes, or a node named in `asked` gives to a decision."""
    decided = frozenset(asked)
    ends = (n for n in nodes if n.op == "output" or n.name in decided or writes(n))
    return frozenset(reached(ends, _operands))


def empty(nodes: Iterable[Node]) -> Iterator[str]:
    """The names of nodes without elements, by which nothing is read for the example: where values decide, others may have some."""
    for node in nodes:
        made = node.meta.get("val")
        if isinstance(made, torch.Tensor) and any(type(size) is int and not size for size in made.shape):
            yield node.name


def _operands(node: Node) -> Iterator[Node]:
    """What a node takes the numbers of."""
    name = without_overload(node.target)
    if name in LOOKS_AT_SHAPES:
        return
    second = node.args[1] if name in _SHAPE_OF_SECOND and len(node.args) > 1 else None
    yield from (operand for operand in node.all_input_nodes if operand is not second or operand is node.args[0])
