"""STUN: experts that are chosen alike are one cluster, of which one expert stays (METHODS.md 2.27)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import Axis, DependencyGraph
from depgraph.coupling import NONE
from depgraph.errors import NothingToPrune, ScoreError
from depgraph.finite import require_finite
from importance.activation import with_unread
from importance.clustering import Clusters, coactivation_distances, linkage, merged, row_distances
from importance.consumed import consumed_dims
from importance.layout import Layout, Place

_PIECE = 1 << 22
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Mixture:
    """An axis of experts: the place of the gate, the matrix with a row for each that scores them, and of their weights."""

    axis: str
    size: int
    gate: Place
    weights: tuple[Place, ...]


def mixtures(graph: DependencyGraph) -> list[Mixture]:
    """The axes of experts with a gate: those along which matrices are stacked, and a matrix is multiplied with what comes in.

    Of a tensor of three dims or more no dim but the first of an expert axis counts groups one by one; the gate is a parameter of
    two dims whose other dim is summed over. Both are seen from the graph, not from names.
    """
    layout, read = Layout.of(graph), consumed_dims(graph)
    found = []
    for axis in graph.axes:
        places = layout.places[axis.name]
        gates = [p for p in places if _is_gate(p, layout.parameters[p.parameter], axis, read)]
        stacks = tuple(p for p in places if _is_stack(p, layout.parameters[p.parameter], axis, read))
        if len(gates) == 1 and stacks:
            found.append(Mixture(axis.name, axis.size, gates[0], tuple(p for p in places if p is not gates[0])))
    return found


def _one_each(place: Place, axis: Axis) -> bool:
    used = place.labels[place.labels != NONE]
    return len(used) == axis.size == len(np.unique(used))


def _is_gate(place: Place, parameter: Tensor, axis: Axis, read: set[tuple[int, int]]) -> bool:
    return parameter.ndim == 2 and _one_each(place, axis) and (id(parameter), 1 - place.dim) in read


def _is_stack(place: Place, parameter: Tensor, axis: Axis, read: set[tuple[int, int]]) -> bool:
    """Is a matrix stacked along this dim for every group, one of whose dims is summed over?"""
    others = [d for d in range(parameter.ndim) if d != place.dim]
    summed = any((id(parameter), d) in read for d in others)
    return parameter.ndim == 3 and _one_each(place, axis) and summed and (id(parameter), place.dim) not in read


@dataclass(frozen=True)
class ExpertClusters:
    """Scores of experts by how near they are to another that can stand in for them.

    Distances between experts are those of their rows of the gate, relative to its size, or how rarely they are chosen
    together, or a mix. Clusters are merged, nearest first, by complete linkage; where two are, the expert that stands for one
    of them goes: the one that is farther (L2 over all weights) from the mean of all members. Its score is the distance at which
    it goes, so that a threshold on scores of all layers is STUN's on distances. The last expert scores above all others. Axes
    without experts have no such scores: they go last, by the size of their weights (`only=importance.units(graph, "experts")`
    leaves them out).

    Args:
        coactivation: by the name of an expert axis, how often two experts were chosen for one token, [experts, experts].
        gate_weight: what the distances of gate rows count beside those of co-activation, which count 1; the paper's code takes
            co-activation alone (0).

    Raises, when called: NothingToPrune when the graph has no axis of experts with a gate, ScoreError for counts of an axis that
    is none, and DataError for counts that are no symmetric matrix.
    """

    comparable: ClassVar[bool] = True

    coactivation: Mapping[str, np.ndarray] | None = None
    gate_weight: float = 1.0

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_finite(graph.model, ScoreError)
        layout, found = Layout.of(graph), mixtures(graph)
        if not found:
            raise NothingToPrune(
                "no axis of stacked experts with a gate was found: score this model's other axes by something else"
            )
        unknown = sorted(set(self.coactivation or {}) - {mixture.axis for mixture in found})
        if unknown:
            raise ScoreError(
                f"{unknown[0]!r} is no axis of experts: co-activation can be given for {', '.join(m.axis for m in found)}"
            )
        return with_unread(graph, {m.axis: self._scores(layout, m) for m in found})

    def distances(self, graph: DependencyGraph, mixture: Mixture) -> np.ndarray:
        """The distances of a mixture's experts, [experts, experts], infinite on the diagonal."""
        return self._distances(Layout.of(graph), mixture)

    def _distances(self, layout: Layout, mixture: Mixture) -> np.ndarray:
        counts = (self.coactivation or {}).get(mixture.axis)
        gate = np.concatenate(list(_pieces(layout, mixture.gate)), axis=1)
        rows = row_distances(gate, relative=True)
        if counts is None:
            return rows
        together = coactivation_distances(counts)
        if together.shape != rows.shape:
            raise ScoreError(f"{mixture.axis!r} has {mixture.size} experts, but co-activation counts {together.shape}")
        return together + self.gate_weight * rows if self.gate_weight else together

    def _scores(self, layout: Layout, mixture: Mixture) -> np.ndarray:
        experts = _products(layout, mixture)
        members = {unit: [unit] for unit in range(mixture.size)}
        standing = {unit: unit for unit in range(mixture.size)}
        scores = np.full(mixture.size, np.nan)
        for one, two, apart in linkage(self._distances(layout, mixture)):
            members[one] += members.pop(two)
            pair = [standing[one], standing.pop(two)]
            stays = _nearest(experts, members[one], pair)
            standing[one] = stays
            scores[pair[1 - pair.index(stays)]] = apart
        top = float(np.nanmax(scores, initial=0.0))
        return np.where(np.isnan(scores), top + max(abs(top), 1.0), scores)


def expert_clusters(distances: np.ndarray, keep: int) -> Clusters:
    """`keep` clusters of experts as STUN's code finds them: the lowest threshold at which its greedy merging comes to so few.

    Raises ScoreError when `keep` isn't from 1 to the number of experts.
    """
    if not 1 <= keep <= len(distances):
        raise ScoreError(f"from 1 to {len(distances)} experts can be kept, not {keep}")
    upper = np.unique(distances[np.triu_indices(len(distances), 1)])
    steps = [*np.nextafter(upper, np.inf)]
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(merged(distances, steps[middle], keep)) <= keep else (middle + 1, high)
    return merged(distances, steps[low] if low < len(steps) else np.inf, keep)


def representatives(graph: DependencyGraph, mixture: Mixture, clusters: Iterable[Iterable[int]]) -> list[int]:
    """For each cluster its member that is nearest (L2 over all weights, the gate's row aside) to the mean of the cluster."""
    experts = _products(Layout.of(graph), mixture)
    return [_nearest(experts, list(cluster), list(cluster)) for cluster in clusters]


def averaged_experts(graph: DependencyGraph, mixture: Mixture, clusters: Iterable[Iterable[int]]) -> dict[str, Tensor]:
    """Parameters in which the representative of every cluster is the mean of its members, gate row and all, by name.

    Write them into the model before the others are cut out (STUN averages where few clusters are left). The model isn't changed.
    """
    layout, listed = Layout.of(graph), [list(cluster) for cluster in clusters]
    stays = representatives(graph, mixture, listed)
    changed: dict[str, Tensor] = {}
    for place in (mixture.gate, *mixture.weights):
        tensor = changed.get(place.parameter, layout.parameters[place.parameter].detach()).clone()
        source = tensor.clone()
        for expert, cluster in zip(stays, listed, strict=True):
            rows = [torch.from_numpy(np.flatnonzero(place.labels == unit)).to(tensor.device) for unit in cluster]
            mean = torch.stack([source.index_select(place.dim, at).float() for at in rows]).mean(dim=0)
            tensor.index_copy_(place.dim, rows[cluster.index(expert)], mean.to(tensor.dtype))
        changed[place.parameter] = tensor
    return changed


def _pieces(layout: Layout, place: Place) -> Iterator[np.ndarray]:
    """What a parameter has of each group, in the order of groups, a piece of the columns at a time: [groups, ...] in float64."""
    order = np.argsort(np.where(place.labels == NONE, np.iinfo(np.int64).max, place.labels), kind="stable")
    parameter = layout.parameters[place.parameter].detach().movedim(place.dim, 0)
    used = torch.from_numpy(order[: int((place.labels != NONE).sum())]).to(parameter.device)
    table = parameter if parameter.ndim > 1 else parameter[:, None]
    step = max(1, _PIECE * table.shape[1] // max(table.numel(), 1))
    for piece in table.split(step, dim=1):
        yield piece.index_select(0, used).cpu().double().reshape(int(place.labels.max()) + 1, -1).numpy()


def _products(layout: Layout, mixture: Mixture) -> np.ndarray:
    """The inner products of all experts' weights, [experts, experts]: all that distances to means need."""
    total = np.zeros((mixture.size, mixture.size))
    for place in (p for p in mixture.weights if layout.parameters[p.parameter].ndim > 1):
        for rows in _pieces(layout, place):
            total += rows @ rows.T
    return total


def _nearest(products: np.ndarray, cluster: list[int], among: list[int]) -> int:
    """Which of `among` is nearest to the mean of a cluster; of those that are as near, as two always are, the largest."""
    sizes = products[among, among]
    apart = sizes - 2 * products[np.ix_(among, cluster)].mean(axis=1)  # |x - m|^2, but for what all have alike
    near = apart <= apart.min() + _ROUNDING * np.abs(products[cluster, cluster]).max()
    return among[int(np.argmax(np.where(near, sizes, -1.0)))]
