"""Experts that are alike are merged into clusters, and one of each cluster is kept (STUN, METHODS.md 2.27).

Experts are alike whose rows in the router are near, or that are chosen for the same tokens. Two clusters are as far apart as
the farthest pair of theirs (complete linkage), and the nearest two are joined, one pair after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from depgraph import Axis, DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.errors import ScoreError
from depgraph.layers import Anatomy
from importance.activation import with_unread
from importance.calling import calls_of, check_batches, device_of, samples_in
from importance.choosing import choice_of, decided_at
from importance.fpgm import in_front, indices_of, slices
from importance.laid_out import Samples
from importance.layout import Layout, Place
from importance.units import units

_ROUNDING = 1e-9


class Merge(NamedTuple):
    """Two clusters become one, at this distance: `kept` stands for it, `lost` for nothing from here on."""

    kept: int
    lost: int
    distance: float


def merges(distances: np.ndarray, inner: np.ndarray | None = None) -> Iterator[Merge]:
    """All joins of n experts with these distances [n, n], nearest clusters first, until one is left.

    `inner` are the inner products of the experts' weights [n, n]: of the two that stand for the joined clusters, the one
    nearer to the mean of all members' weights stays; without it, the one that comes first.
    """
    apart = np.array(distances, dtype=np.float64)
    np.fill_diagonal(apart, np.inf)
    members = {expert: [expert] for expert in range(len(apart))}
    while len(members) > 1:
        one, other = (int(i) for i in sorted(np.unravel_index(np.argmin(apart), apart.shape)))
        distance = float(apart[one, other])
        joined = members.pop(one) + members.pop(other)
        kept = one if inner is None else nearest_to_mean(inner, joined, (one, other))
        lost = other if kept == one else one
        farthest = np.maximum(apart[one], apart[other])
        apart[lost], apart[:, lost] = np.inf, np.inf
        apart[kept], apart[:, kept] = farthest, farthest
        apart[kept, kept] = apart[kept, lost] = apart[lost, kept] = np.inf
        members[kept] = joined
        yield Merge(kept, lost, distance)


def nearest_to_mean(inner: np.ndarray, members: Iterable[int], candidates: Iterable[int]) -> int:
    """Of `candidates`, the one whose weights are nearest to the mean of those of `members`; `inner` are inner products [n, n].

    Of those that are as near, as two members always are, the largest stays; of these, the first.
    """
    given, among = list(members), sorted(candidates)
    sizes = inner[among, among]
    apart = sizes - 2 * inner[np.ix_(among, given)].mean(axis=1)
    near = apart <= apart.min() + _ROUNDING * np.abs(inner[given, given]).max()
    return among[int(np.argmax(np.where(near, sizes, -1.0)))]


def clusters_of(distances: np.ndarray, count: int) -> list[list[int]]:
    """The experts in `count` clusters, from distances [n, n]. Raises ScoreError for a count below 1 or above n."""
    if not 1 <= count <= len(distances):
        raise ScoreError(f"{len(distances)} experts can't be in {count} clusters")
    return _joined(len(distances), list(merges(distances))[: len(distances) - count])


def clusters_below(distances: np.ndarray, threshold: float) -> list[list[int]]:
    """The experts in clusters of which all members are nearer to one another than `threshold`, from distances [n, n]."""
    return _joined(len(distances), [merge for merge in merges(distances) if merge.distance < threshold])


def _joined(count: int, joins: list[Merge]) -> list[list[int]]:
    found = {expert: [expert] for expert in range(count)}
    for merge in joins:
        found[merge.kept] = sorted(found[merge.kept] + found.pop(merge.lost))
    return sorted(found.values())


@dataclass(frozen=True)
class ExpertClusters:
    """Ranks experts so that the n - k that stay after the lowest k stand for n - k clusters of experts that are alike.

    An expert's score is the distance at which its cluster is joined to one that another expert stands for: by `router` times
    the distance of the router's rows (over the norm of all), less `coactivation` times how many tokens both were chosen for
    (over the mean of that). Of two experts that stand for clusters, the one nearer to the mean of the joined one's stays, over
    all weights but the router's. The paper takes the member of a cluster nearest to its mean, whatever stood for its parts:
    then what is kept at one ratio isn't part of what is kept at a milder one, and no score ranks it.

    Axes that aren't experts go last, by the size of their weights.

    Args:
        data: batches (tensors, tuples of arguments or dicts of keyword arguments); needed with `coactivation` only.
        router: the share of the router's rows in distances.
        coactivation: the share of common tokens.

    Raises: ScoreError at once when neither has a share, or batches are missing; when called, NothingToPrune for a model without
    experts, ScoreError where no top-k chooses them or weights are NaN or infinite, DataError for no batches or unfit ones.
    """

    comparable: ClassVar[bool] = True

    data: Iterable[Any] | None = field(default=None)
    router: float = 1.0
    coactivation: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.router < np.inf and 0 <= self.coactivation < np.inf and self.router + self.coactivation > 0):
            raise ScoreError("router and coactivation must be at least 0, and one of them more than that")
        if self.coactivation and self.data is None:
            raise ScoreError("which experts are chosen together needs calibration data: pass batches")
        if self.data is not None:
            check_batches(self.data)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        names, layout = units(graph, "experts"), Layout.of(graph)
        common = _together(graph, names, self.data) if self.coactivation and self.data is not None else {}
        anatomy = Anatomy(graph)
        scores = {}
        for name in names:
            size = graph[name].size
            chosen = routers(anatomy, name)
            whole = {target for entries in graph[name].entries for held in entries.tensors for target in held}
            places = [place for place in layout.places[name] if place.parameter not in whole]
            rows = inner_products(layout, [p for p in places if id(layout.parameters[p.parameter]) in chosen], size)
            held = inner_products(layout, [p for p in places if id(layout.parameters[p.parameter]) not in chosen], size)
            held += whole_products(graph[name], layout)
            distances = self.router * _distances(rows)
            if name in common:
                distances = distances - self.coactivation * _over_mean(common[name])
            scores[name] = _ranks(distances, held)
        return with_unread(graph, scores)


def routers(anatomy: Anatomy, axis: str) -> set[int]:
    """The ids of the weights whose outputs are along an axis."""
    widths, tensors = anatomy.graph.widths, anatomy.graph.tensors()
    made = (layer for layer in anatomy.layers if layer.out is not None and axis in widths.axes_of(layer.out))
    return {id(tensors[layer.target]) for layer in made if not layer.beside}


@torch.no_grad()
def inner_products(layout: Layout, places: list[Place], size: int) -> np.ndarray:
    """The inner products of groups' slices of weights, added over these: [groups, groups] in float64."""
    total = np.zeros((size, size))
    for place in places:
        groups, table = indices_of(place.labels)
        weight = layout.parameters[place.parameter].detach()
        found: Tensor = sum(
            part @ part.T for part in slices(in_front(weight, place.dim), torch.from_numpy(table).to(weight.device))
        )  # type: ignore[assignment]
        total[np.ix_(groups, groups)] += found.cpu().double().numpy()
        if not np.isfinite(total).all():
            raise ScoreError(
                f"parameter {place.parameter!r} holds NaN or infinite values: repair or reload the weights before scoring"
            )
    return total


@torch.no_grad()
def whole_products(axis: Axis, layout: Layout) -> np.ndarray:
    """The same of the weights of whole modules that go with the groups, weight by weight: [groups, groups] in float64."""
    total = np.zeros((axis.size, axis.size))
    for entries in axis.entries:
        for alike in zip(*(entries.going([group]) for group in range(axis.size)), strict=False):
            names = [sorted(name for name in entries.tensors[k] if name in layout.parameters) for k in alike]
            for held in zip(*names, strict=True):
                total += inner_of(held, layout)
    return total


def inner_of(names: Iterable[str], layout: Layout) -> np.ndarray:
    """The inner products of parameters, 0 for two of other shapes. Raises ScoreError where one holds NaN or infinite values."""
    weights = [layout.parameters[name].detach().double() for name in names]
    found = np.array([[float((a * b).sum()) if a.shape == b.shape else 0.0 for b in weights] for a in weights])
    if not np.isfinite(found).all():
        name = next(name for name, row in zip(names, found, strict=True) if not np.isfinite(row).all())
        raise ScoreError(
            f"parameter {name!r} holds NaN or infinite values: repair or reload the weights before scoring"
        )
    return found


def _distances(inner: np.ndarray) -> np.ndarray:
    """Distances of rows with these inner products, over the norm of all."""
    squares = np.diag(inner)
    apart = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * inner, 0))
    return apart / np.sqrt(squares.sum()) if squares.sum() > 0 else apart


def _over_mean(counts: np.ndarray) -> np.ndarray:
    mean = float(np.abs(counts).mean())
    return counts / mean if mean else counts


def _ranks(distances: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The distances at which experts are lost, each a little above those lost before; the last one's is above all."""
    scores, before, last = np.zeros(len(distances)), -np.inf, 0
    for merge in merges(distances, inner):
        before = max(merge.distance, float(np.nextafter(before, np.inf)))
        scores[merge.lost], last = before, merge.kept
    scores[last] = before + max(abs(before), 1.0) if np.isfinite(before) else 0.0
    return scores


def _together(graph: DependencyGraph, names: list[str], batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """For every axis of experts, how many tokens each two of its groups were chosen for: [groups, groups], zero for itself."""
    choosing = {name: choice_of(graph, name) for name in names}
    counts = {name: np.zeros((graph[name].size, graph[name].size)) for name in names}
    observer, samples = graph.observer(), Samples(1)

    def count(name: str, chosen: Tensor) -> None:
        labels = torch.from_numpy(choosing[name].labels).to(chosen.device)
        groups = labels[chosen.reshape(-1, chosen.shape[-1])]
        each = torch.zeros(len(groups), graph[name].size + 1, device=chosen.device).scatter_(
            1, groups % (graph[name].size + 1), 1.0
        )
        rows = samples.rows(each[:, :-1], -1, torch.float32).flat
        counts[name] += (rows.T @ rows).cpu().double().numpy()

    made = {name: choice.made for name, choice in choosing.items() if choice.place is None}
    watch = {node: lambda chosen, name=name: count(name, chosen) for name, node in made.items()}
    decided = {name: choice.place for name, choice in choosing.items() if choice.place is not None}
    with quiet(graph.model):
        for args, kwargs in calls_of(graph, batches, "to see experts chosen on"):
            samples = samples_in(graph, args, kwargs)
            if watch:
                observer.watch((args, kwargs), seen=watch)
            for name, place in decided.items():
                chosen = decided_at(observer.runnable(args, kwargs).exported, place)
                count(name, chosen.to(device_of(graph.tensors().values())))
    for found in counts.values():
        np.fill_diagonal(found, 0)
    return counts
