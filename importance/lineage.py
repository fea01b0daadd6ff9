"""What several cuts, one after the other, took from the first model: of every axis there, the groups that went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from depgraph import Axis, DependencyGraph, Plan
from depgraph.classes import NONE
from depgraph.errors import PlanError
from depgraph.graph import Value
from depgraph.latency import LatencyModel
from depgraph.widths import Kept


@dataclass
class _Witness:
    """A dim of a parameter that has all groups of an axis: to which of them each of the indices that are left belongs."""

    target: str
    dim: int
    groups: int
    labels: np.ndarray

    def after(self, kept: Kept, values: Mapping[str, Value]) -> np.ndarray:
        """The labels that what remains of the current model leaves."""
        value = values.get(self.target)
        if value is None or value.shape[self.dim] != len(self.labels):
            return self.labels
        left = kept.of(value, self.dim)
        return self.labels if left is None else self.labels[left]

    def gone(self, labels: np.ndarray) -> np.ndarray:
        return np.setdiff1d(np.arange(self.groups), labels)


class Lineage:
    """Follows the parameters of a graph's model through cuts, each of what the one before left, by their names."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.first = graph
        self._witnesses = {axis.name: found for axis in graph.axes if (found := _witness(axis, _values(graph)))}

    def cut(self, plan: Plan) -> None:
        """A plan of the current model was carried out."""
        values, kept = _values(plan.graph), plan.kept()
        for witness in self._witnesses.values():
            witness.labels = witness.after(kept, values)

    def kept(self, kept: Kept, graph: DependencyGraph) -> Kept:
        """What is left of the first model where `kept` is left of the current one, whose graph that is."""
        values = _values(graph)
        gone = {name: witness.gone(witness.after(kept, values)) for name, witness in self._witnesses.items()}
        return self.first.widths.at({name: groups for name, groups in gone.items() if len(groups)})

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> Plan | None:
        """One plan of the first model for all that went; None where that wouldn't leave parameters of these shapes, by name."""
        removal = {name: groups for name, w in self._witnesses.items() if len(groups := w.gone(w.labels))}
        try:
            plan = self.first.cut_plan(removal)
        except PlanError:
            return None
        kept, named = plan.kept(), _values(self.first)
        same = all(kept.shape(named[name]) == shape for name, shape in shapes.items() if name in named)
        return plan if same else None


class Later:
    """A latency model of what cuts have left of a model, by that of the model before them."""

    def __init__(self, lineage: Lineage, latency: LatencyModel, graph: DependencyGraph) -> None:
        self._lineage, self._latency, self._graph = lineage, latency, graph

    def ms(self, kept: Kept, /) -> float:
        return self._latency.ms(self._lineage.kept(kept, self._graph))

    def parts(self, kept: Kept, /) -> Mapping[str, float]:
        return self._latency.parts(self._lineage.kept(kept, self._graph))


def _values(graph: DependencyGraph) -> dict[str, Value]:
    values = graph.capture.program.values.values()
    return {value.target: value for value in values if value.kind in ("parameter", "buffer") and value.target}


def _witness(axis: Axis, values: Mapping[str, Value]) -> _Witness | None:
    """The first dim that has all groups of an axis; none of one that takes whole modules along, as names change there."""
    for member in axis.members if not axis.entries else ():
        if member.target in values and len(np.unique(member.labels[member.labels != NONE])) == axis.size:
            return _Witness(member.target, member.dim, axis.size, member.labels)
    return None
