"""Which tensors an operator looks at in place, so that what lies in memory between its numbers follows their sizes."""

from __future__ import annotations

import operator

from torch import Tensor
from torch.fx import Node


def in_rows(node: Node) -> list[Node]:
    """`node` and what it is a view of, one after the other: those that lie in memory row by row."""
    found = []
    while True:
        made = node.meta.get("val")
        if isinstance(made, Tensor) and made.dim() and made.stride()[-1] == 1:
            found.append(node)
        if (
            not node.args
            or not isinstance(node.args[0], Node)
            or not (_is_view(node) or node.target is operator.getitem)
        ):
            return found
        node = node.args[0]


def _is_view(node: Node) -> bool:
    returned = getattr(getattr(node.target, "_schema", None), "returns", ())
    alias = returned[0].alias_info if returned else None
    return alias is not None and not alias.is_write
