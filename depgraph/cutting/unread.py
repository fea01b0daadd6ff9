"""Which sizes that code says matter: those of what an output is computed from, and shapes of what it computes beside that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.fx import Node

from depgraph.capture.matching import SHAPES
from depgraph.capture.recording import Site
from depgraph.operators import aten_name, writes
from depgraph.walks import behind

_SHAPING = frozenset(
    ["view", "reshape", "_unsafe_view", "unflatten", "expand", "split_with_sizes"]
    + ["layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "conv1d", "conv2d", "conv3d", "convolution"]
)
"""Operators that fail where a size that they are given doesn't fit their tensors."""


def by_reading(sites: Iterable[Site], nodes: Mapping[str, Node]) -> tuple[list[Site], list[Site]]:
    """Sizes of operators that an output is computed from, or that change a tensor, and those that anything else fails by.

    What nobody takes (a last state, keys where only queries count, the last norm of a backbone whose other states are taken) is
    computed all the same, and fails where its sizes don't fit.
    """
    names = _read(nodes.values())
    said = [site for site in sites if site.node in nodes and site.origin != SHAPES]
    read = [site for site in said if site.node in names and not _without_meaning(nodes[site.node], site)]
    return read, [site for site in said if site.node not in names and aten_name(nodes[site.node]) in _SHAPING]


def _without_meaning(node: Node, site: Site) -> bool:
    """Is this a size that the operator is given and doesn't use? A grid is made for a picture of any number of channels."""
    return str(node.target) == "aten.affine_grid_generator.default" and site.path == ("args", 1, 1)


def _read(nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the operators that an output is computed from, or that change a tensor; others assert something or go nowhere."""
    return frozenset(node.name for node in behind(n for n in nodes if n.op == "output" or writes(n)))
