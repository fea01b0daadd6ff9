"""Numbers of which any from some on do the same: where a slice ends with what it is taken of, and bounds that no index reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch.fx import Node

from depgraph.capture.recording import Site
from depgraph.graph import Value
from depgraph.operators import by_name
from depgraph.rules.domains import LEAST, base_name, says_nothing

SizeOf = Callable[[int], int]
_END = "end"


def lowest(node: Node, site: Site, values: Mapping[str, Value], sizes: tuple[SizeOf, SizeOf]) -> int | None:
    """The least number that does at `site` of operator `node` after a cut; None where only one does.

    `sizes` are those of dims before and after.
    """
    name, least = _bound(node.target)
    source = values.get(node.all_input_nodes[0].name) if name and node.all_input_nodes else None
    if source is None or not isinstance(site.value, int) or _argument(node, site) != name:
        return None
    before, after = sizes
    if name == _END:
        dim = source.dims[node.args[1]]  # type: ignore[index]
        return after(dim) if site.value == before(dim) else None
    if source.domain is None or len(node.all_input_nodes) > 1:
        return None
    size = before(source.domain)
    if site.value < size + least or not says_nothing(str(node.target), by_name(node).get, source, size):
        return None
    return after(source.domain) + least


@cache
def _bound(target: Any) -> tuple[str, int]:
    """The argument of an operator that may be such a number, and what is added to the size for the least that does."""
    if str(target) == "aten.slice.Tensor":
        return _END, 0
    return LEAST.get(base_name(str(target)), ("", 0))


def _argument(node: Node, site: Site) -> str:
    where, key, *_ = site.path
    return key if where == "kwargs" else node.target._schema.arguments[key].name  # type: ignore[union-attr]
