"""What becomes of merged experts: the one that stays for a cluster takes the mean of its members (STUN, METHODS.md 2.27)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from depgraph.layers import Anatomy
from importance.experts import inner_products, nearest_to_mean, routers
from importance.layout import Layout, Place


@torch.no_grad()
def averaged(
    graph: DependencyGraph, axis: str, clusters: Iterable[Iterable[int]]
) -> tuple[dict[str, Tensor], list[int]]:
    """New parameters by name, and the expert that stays for each cluster; the model is left as it is.

    It is the member whose weights, the router's aside, are nearest to the cluster's mean; in the new parameters it has the mean
    of all members, with its row of the router. Write them into the model, then cut the others out: where few clusters are
    left, STUN averages instead of keeping one expert as it was.

    Raises ScoreError when the clusters don't hold every group of the axis once.
    """
    layout, listed = Layout.of(graph), [list(cluster) for cluster in clusters]
    size, places = layout.sizes[axis], layout.places[axis]
    if sorted(expert for cluster in listed for expert in cluster) != list(range(size)):
        raise ScoreError(f"every group of {axis!r}, 0 to {size - 1}, must be in one cluster")
    chosen = routers(Anatomy(graph), axis)
    held = [p for p in places if id(layout.parameters[p.parameter]) not in chosen]
    inner = inner_products(layout, [p for p in held if layout.parameters[p.parameter].ndim > 1], size)
    stays = [nearest_to_mean(inner, cluster, cluster) for cluster in listed]
    changed: dict[str, Tensor] = {}
    for place in places:
        tensor = changed.get(place.parameter, layout.parameters[place.parameter].detach())
        changed[place.parameter] = _averaged(tensor, place, listed, stays)
    return changed, stays


def _averaged(tensor: Tensor, place: Place, clusters: list[list[int]], stays: list[int]) -> Tensor:
    found = tensor.clone()
    for expert, cluster in zip(stays, clusters, strict=True):
        at = {unit: torch.from_numpy(np.flatnonzero(place.labels == unit)).to(tensor.device) for unit in cluster}
        mean = torch.stack([tensor.index_select(place.dim, at[unit]).double() for unit in cluster]).mean(dim=0)
        found.index_copy_(place.dim, at[expert], mean.to(tensor.dtype))
    return found
