"""Numbers of which any from some on do the same: where a slice ends with what it is taken of, and bounds that no index reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.fx import Node

from depgraph.capture.recording import Site
from depgraph.cutting.rewriting import by_name
from depgraph.graph import Value
from depgraph.rules.domains import LEAST, says_nothing

SizeOf = Callable[[int], int]


def lowest(node: Node, site: Site, values: Mapping[str, Value], sizes: tuple[SizeOf, SizeOf]) -> int | None:
    """The least number that does at `site` of operator `node` after a cut; None where only one does.

    `sizes` are those of dims before and after.
    """
    source = values.get(node.all_input_nodes[0].name) if node.all_input_nodes else None
    if source is None or not isinstance(site.value, int):
        return None
    before, after = sizes
    if str(node.target) == "aten.slice.Tensor" and site.path == ("args", 3):
        dim = source.dims[node.args[1]]  # type: ignore[index]
        return after(dim) if site.value == before(dim) else None
    name, least = LEAST.get(".".join(str(node.target).split(".")[:2]).removesuffix("_"), ("", 0))
    if not name or source.domain is None or len(node.all_input_nodes) > 1 or _argument(node, site) != name:
        return None
    size = before(source.domain)
    if site.value < size + least or not says_nothing(str(node.target), by_name(node).get, source, size):
        return None
    return after(source.domain) + least


def _argument(node: Node, site: Site) -> str:
    where, key, *_ = site.path
    return key if where == "kwargs" else node.target._schema.arguments[key].name  # type: ignore[union-attr]
