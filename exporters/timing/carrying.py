"""What a plan of one graph leaves of another graph of the same model: a PyTorch module's plan on its ONNX file.

Nothing but parameters is compared. The file has most of them under their names, and matrices of Linear layers transposed and
without a name, which are known by their numbers. An axis of the file loses a group when all indices of the group are gone
from a parameter that both have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from depgraph.axes import Axis
from depgraph.classes import NONE
from depgraph.dependency import DependencyGraph
from depgraph.graph import Value
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.widths import Kept

Removed = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Witness:
    """A dim of the one graph, by its class, and to which group of an axis of the other each of its indices belongs."""

    axis: str
    groups: int
    number: int
    labels: np.ndarray


class Carrier:
    """From what remains of `graph` to what remains of `other`."""

    def __init__(self, graph: DependencyGraph, other: OnnxGraph) -> None:
        self.graph, self.other = graph, other
        shared = {} if graph is other else dict(_shared(graph, other))
        self.witnesses = [w for axis in other.axes for w in self._witness(axis, shared)]
        self._known: dict[int, tuple[bytes, np.ndarray]] = {}

    def kept(self, kept: Kept) -> Kept:
        """What remains of the other graph."""
        if self.graph is self.other:
            return kept
        removal: Removed = {}
        for witness in self.witnesses:
            left = kept.of_class(witness.number)
            if left is None:
                continue
            stays = np.zeros(witness.groups, dtype=bool)
            labels = witness.labels[left]
            stays[labels[labels != NONE]] = True
            if not stays.all():
                removal[witness.axis] = np.flatnonzero(~stays)
        return self.other.widths.at(removal)

    def lost(self) -> list[str]:
        """Axes of the other graph that no parameter of this one is known to reach."""
        seen = {witness.axis for witness in self.witnesses}
        return [axis.name for axis in self.other.axes if axis.prunable.any() and axis.name not in seen]

    def _witness(self, axis: Axis, shared: dict[str, tuple[Value, bool]]) -> Iterator[_Witness]:
        """The first dim that has all groups of an axis."""
        for member in axis.members:
            if member.target not in shared:
                continue
            value, flipped = shared[member.target]
            labels = member.labels
            if len(np.unique(labels[labels != NONE])) == axis.size:
                dim = 1 - member.dim if flipped else member.dim
                yield _Witness(axis.name, axis.size, self.graph.widths.class_of(value.dim(dim)), labels)
                return


def _shared(graph: DependencyGraph, other: OnnxGraph) -> Iterator[tuple[str, tuple[Value, bool]]]:
    """Stored tensors of the file that are parameters of the module: the value there, and whether it is transposed here."""
    named = {
        v.target: v for v in graph.capture.program.values.values() if v.kind in ("parameter", "buffer") and v.target
    }
    tensors = graph.tensors()
    matrices: dict[tuple[int, ...], list[str]] = {}
    for name, value in named.items():
        if len(value.shape) == 2:
            matrices.setdefault(value.shape[::-1], []).append(name)
    for name, value in ((n, other.capture.program.values[n]) for n in other.capture.lowered.held):
        plain = name.split("#")[0]
        if plain in named and named[plain].shape == value.shape:
            yield name, (named[plain], False)
        elif len(value.shape) == 2 and (
            found := _transposed(other.array(name), matrices.get(value.shape, []), tensors)
        ):
            yield name, (named[found], True)


def _transposed(array: np.ndarray, names: list[str], tensors: Mapping[str, torch.Tensor]) -> str:
    """Which of some matrices is the transpose of this one."""
    for name in names:
        tensor = tensors[name].detach().cpu()
        if np.array_equal(tensor[:, 0].float().numpy(), array[0].astype(np.float32)) and np.array_equal(
            tensor.float().numpy().T, array.astype(np.float32)
        ):
            return name
    return ""
