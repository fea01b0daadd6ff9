"""Where the axes lie on the parameters: which dims must be scored, and how their scores come together per axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from depgraph import Axis, DependencyGraph
from depgraph.errors import ScoreError
from depgraph.scoring import require_graph
from importance.normalisation import Normalisation
from importance.reduction import Reduction

Sums = Mapping[str, Mapping[int, torch.Tensor]]
"""Per parameter and dim, one score per index: tensors [size of the dim]."""


@dataclass(frozen=True)
class Place:
    """A dim of a parameter (by its first name, if it has several) and the group of each of its indices, -1 for none."""

    parameter: str
    dim: int
    labels: np.ndarray


@dataclass(frozen=True)
class Layout:
    """The distinct parameters of a graph that its axes reach, and the places of every axis on them.

    A tensor that is known by several names counts once per axis and dim. Buffers aren't scored.
    """

    parameters: dict[str, torch.Tensor]
    places: dict[str, tuple[Place, ...]]
    sizes: dict[str, int]

    @classmethod
    def of(cls, graph: DependencyGraph) -> Layout:
        """The layout of a graph's axes.

        Raises ScoreError for a parameter without values (on the meta device), one that has changed its size since the graph was
        traced, and what is no graph.
        """
        require_graph(graph)
        tensors = graph.tensors()
        places = {}
        names: dict[str, None] = {}
        first = _first_names(graph, tensors)
        for axis in graph.axes:
            found = _places(axis, tensors, first)
            places[axis.name] = tuple(found.values())
            names |= dict.fromkeys(place.parameter for place in found.values())
        read = getattr(tensors, "only", None)  # what is read from a file stays there until it is asked for
        parameters = {name: tensors[name] for name in names} if read is None else read(names)
        return cls(parameters, places, {axis.name: axis.size for axis in graph.axes})

    @cached_property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """The dims of each parameter that some axis reaches."""
        found: dict[str, set[int]] = {name: set() for name in self.parameters}
        for places in self.places.values():
            for place in places:
                found[place.parameter].add(place.dim)
        return {name: tuple(sorted(dims)) for name, dims in found.items()}

    def scores(self, sums: Sums, reduction: Reduction, normalisation: Normalisation) -> dict[str, np.ndarray]:
        """Group scores of every axis, float64 [groups], from scores per index of every parameter dim.

        Raises ScoreError when a score is NaN or infinite, naming the parameter.
        """
        arrays = {(name, d): sums[name][d].cpu().double().numpy() for name, dims in self.dims.items() for d in dims}
        for (name, d), array in arrays.items():
            if not np.isfinite(array).all():
                raise ScoreError(_what_is_wrong(name, self.parameters[name], d, array))
        return {
            axis: normalisation(reduction([(p.labels, arrays[p.parameter, p.dim]) for p in places], self.sizes[axis]))
            for axis, places in self.places.items()
        }


def _first_names(graph: DependencyGraph, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The first name of each tensor, by all of its names."""
    if not isinstance(tensors, dict):
        ties = graph.capture.program.ties
        return {name: ties.get(name, name) for name in tensors}
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _places(axis: Axis, tensors: Mapping[str, torch.Tensor], first: Mapping[str, str]) -> dict[tuple[str, int], Place]:
    found: dict[tuple[str, int], Place] = {}
    for member in axis.members:
        if member.kind != "parameter":
            continue
        tensor = tensors.get(member.target)
        if tensor is None or tensor.shape[member.dim : member.dim + 1] != member.labels.shape:
            raise ScoreError(
                f"parameter {member.target!r} is no longer what the graph was traced with: trace the model again"
            )
        if tensor.is_meta:
            raise ScoreError(
                f"parameter {member.target!r} is on the meta device and has no values: load the weights first"
            )
        name = first[member.target]
        found.setdefault((name, member.dim), Place(name, member.dim, member.labels))
    return found


def _what_is_wrong(name: str, parameter: torch.Tensor, dim: int, sums: np.ndarray) -> str:
    index = int(np.flatnonzero(~np.isfinite(sums))[0])
    at = f"parameter {name!r} (index {index} of dim {dim})"
    if not bool(torch.isfinite(parameter.detach()).all()):
        return f"{at} holds NaN or infinite values: repair or reload the weights before scoring"
    return f"{at} has finite weights, but NaN or infinite scores: look at its gradients and their scale"
