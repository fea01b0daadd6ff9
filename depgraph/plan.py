"""A plan: which groups go. Data that can be printed, saved, edited, merged, and applied."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from depgraph.errors import CheckpointError, PlanError
from depgraph.files import written
from depgraph.garbage import uncollected
from depgraph.remaining import why_not
from depgraph.widths import Cost, Kept, Removal

if TYPE_CHECKING:
    from depgraph.cutting.report import CutReport
    from depgraph.dependency import DependencyGraph

FORMAT = 1


class Removed(NamedTuple):
    """Indices that go from one dim of one parameter or buffer, by its position in the dense tensor."""

    target: str
    dim: int
    indices: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Which groups of which axes go (`removal`: axis name -> group numbers, ascending), and which branches and blocks.

    `branches` are names of `graph.branches` and `graph.blocks`; what these hold is left out, whatever axes say of it.
    `config` holds the integers of a transformers config that make it build the pruned model, by dotted name; only a uniform
    plan has them, and one that is made from it by leaving out, adding or merging doesn't.
    """

    graph: DependencyGraph = field(repr=False)
    removal: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    config: dict[str, int] = field(default_factory=dict)
    branches: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, graph: DependencyGraph, removal: Removal, notes: Iterable[str] = (), branches: Iterable[str] = ()
    ) -> Plan:
        """A plan after checking it: axes, groups and branches exist, may go, and leave at least one index of everything.

        Raises PlanError that names the axis or the branch otherwise.
        """
        if not isinstance(removal, Mapping):
            raise PlanError(f"{removal!r} says of no axis what goes: give group numbers by the name of an axis")
        checked = {}
        for name, groups in removal.items():
            numbers = tuple(sorted({_whole(name, g) for g in _listed(name, groups)}))
            if numbers:
                _check(graph, name, numbers)
                checked[name] = numbers
        plan = cls(graph, checked, tuple(notes), branches=_known(graph, branches))
        why = why_not(graph, plan.branches) if plan.branches else ""
        if why:
            raise PlanError(why)
        plan._check_not_empty()
        plan._check_enough_to_pick()
        return plan

    def _check_not_empty(self) -> None:
        kept = self.kept()
        for value in self.graph.capture.program.values.values():
            if value.kind in ("parameter", "buffer") and 0 in kept.shape(value) and 0 not in value.shape:
                raise PlanError(
                    f"the plan leaves nothing of {value.target!r}: its axes together remove all of a dimension"
                )

    def _check_enough_to_pick(self) -> None:
        kept = self.kept()
        for least in self.graph.capture.program.relations.least:
            if kept.size(least.dim) < least.count:
                axes = " and ".join(repr(a) for a in self.graph.widths.axes_of(least.dim) if a in self.removal)
                raise PlanError(
                    f"the plan leaves {kept.size(least.dim)} indices of a dimension of axis {axes}, but {least.reason}"
                )

    def kept(self) -> Kept:
        """Kept indices and sizes of every dim under this plan, with the names of what is left out."""
        return self.graph.widths.at(self.removal).without(self.branches)

    def cost(self) -> Cost:
        """Exact cost of the pruned model."""
        return self.graph.cost(self.removal, self.branches)

    def removed(self) -> list[Removed]:
        """What goes from every parameter and buffer: (name, dim, indices), in the order of the graph.

        What goes as a whole, with its module, is listed with all indices of its first dim.
        """
        kept = self.kept()
        found = []
        for value in self.graph.capture.program.values.values():
            if value.kind not in ("parameter", "buffer", "constant") or not value.target:
                continue
            if value.target in kept.gone.tensors:
                found += [Removed(value.target, 0, np.arange(size)) for size in value.shape[:1]]
                continue
            for d, size in enumerate(value.shape):
                stays = kept.of(value, d)
                if stays is not None:
                    gone = np.ones(size, dtype=bool)
                    gone[stays] = False
                    found.append(Removed(value.target, d, np.flatnonzero(gone)))
        return found

    def without(self, *names: str) -> Plan:
        """This plan with the named axes left whole, and the named branches left in; raises PlanError for a name that is neither."""
        _known(self.graph, (name for name in names if name not in self.graph.widths.axes))
        left = {k: v for k, v in self.removal.items() if k not in names}
        return Plan.of(self.graph, left, self.notes, (b for b in self.branches if b not in names))

    def with_axis(self, name: str, groups: Iterable[int]) -> Plan:
        """This plan with other groups of one axis removed; raises PlanError for what can't go."""
        return Plan.of(self.graph, {**self.removal, name: groups}, self.notes, self.branches)

    def with_branches(self, *names: str) -> Plan:
        """This plan with further branches or blocks left out; raises PlanError for what can't go."""
        return Plan.of(self.graph, self.removal, self.notes, (*self.branches, *names))

    def merge(self, other: Plan) -> Plan:
        """All that either plan removes; raises PlanError for plans of two graphs, and where no group of an axis would be left."""
        if not isinstance(other, Plan):
            raise PlanError(f"a plan is merged with another plan, not with a {type(other).__name__}")
        if other.graph is not self.graph:
            raise PlanError("plans of two different graphs can't be merged: load one of them on the other's graph")
        names = {*self.removal, *other.removal}
        both = {n: {*self.removal.get(n, ()), *other.removal.get(n, ())} for n in names}
        return Plan.of(self.graph, both, (*self.notes, *other.notes), (*self.branches, *other.branches))

    def __or__(self, other: Plan) -> Plan:
        return self.merge(other)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, with the sizes of the axes so that it can be checked against a graph."""
        axes = {n: {"groups": self.graph[n].size, "removed": list(g)} for n, g in self.removal.items()}
        found = {"format": FORMAT, "axes": axes, "notes": list(self.notes), "config": dict(self.config)}
        return {**found, "branches": list(self.branches)} if self.branches else found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; raises CheckpointError when the file can't be written."""
        written(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def from_json(cls, graph: DependencyGraph, data: Mapping[str, Any]) -> Plan:
        """A plan from plain data; raises PlanError when it doesn't fit the graph."""
        try:
            axes = {str(n): entry["removed"] for n, entry in data["axes"].items()}
            sizes = {str(n): operator.index(entry["groups"]) for n, entry in data["axes"].items()}
            version, notes = data.get("format", FORMAT), [str(note) for note in data.get("notes", ())]
            config = {str(name): operator.index(value) for name, value in data.get("config", {}).items()}
            branches = data.get("branches", ())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"this is not a saved plan: {error!r} (expected axes with 'groups' and 'removed')"
            ) from error
        if version != FORMAT or isinstance(version, bool):
            raise PlanError(
                f"the plan has format {version!r} and this depgraph reads {FORMAT}: save it again with this one"
            )
        for name, size in sizes.items():
            if name in graph.widths.axes and graph[name].size != size:
                raise PlanError(
                    f"the plan was made for {size} groups of axis {name!r}, this graph has {graph[name].size}"
                )
        return replace(cls.of(graph, axes, notes, branches), config=config)

    @classmethod
    def load(cls, graph: DependencyGraph, path: str | os.PathLike[str]) -> Plan:
        """Read a plan saved by `save`; raises PlanError or CheckpointError."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise CheckpointError(f"the plan can't be read from {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise PlanError(f"{path} is not a saved plan: {error}") from error
        return cls.from_json(graph, data)

    def apply(self, **options: Any) -> Any:
        """A new, smaller, checked module, or onnx_ir.Model; the original stays as it is. See `depgraph.cutting.apply`."""
        with uncollected():
            return self.graph.cut(self, options).model

    def apply_(self, **options: Any) -> nn.Module:
        """Cut the graph's own model in place, checked, and return it; a failed cut leaves it as it was.

        What gets narrower is a new parameter: an optimiser that was made before holds the old ones, and is to be made anew.
        """
        from depgraph.cutting.applying import apply_in_place

        with uncollected():
            return apply_in_place(self, **options).model

    def apply_with_report(self, **options: Any) -> CutReport:
        """As `apply`, with the report of what was cut and checked beside the model."""
        with uncollected():
            return self.graph.cut(self, options)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw which attention, MLP and other branches go, by depth; raises DataError without matplotlib (the extra `plot`)."""
        from depgraph.plotting import plot_depth

        plot_depth(self.graph, self.branches, path)

    def __str__(self) -> str:
        from depgraph.report import plan_text

        return plan_text(self)


def _known(graph: DependencyGraph, names: Iterable[str]) -> tuple[str, ...]:
    """Names of branches and blocks, each once, in their order."""
    if isinstance(names, str):
        raise PlanError(f"branches={names!r} is a single name: give a list of names")
    wanted = tuple(dict.fromkeys(_names(names)))
    known = {b.name for b in graph.branches} | {b.name for b in graph.blocks} if wanted else set()
    for name in wanted:
        if name not in known:
            why = graph.branches_refused.get(name, "graph.branches and graph.blocks list what can go")
            raise PlanError(f"{name!r} is no branch or block that can be left out: {why}")
    return wanted


def _names(given: Any) -> list[str]:
    names = list(given) if isinstance(given, Iterable) else [given]
    for name in names:
        if not isinstance(name, str):
            raise PlanError(
                f"{name!r} is no name of a branch or block: graph.branches and graph.blocks list what can go"
            )
    return names


def _listed(name: str, groups: Any) -> Iterable[Any]:
    if isinstance(groups, Mapping) or not isinstance(groups, Iterable):
        raise PlanError(f"the groups of axis {name!r} are {groups!r}: give a list of group numbers, counted from 0")
    return groups


def _whole(name: str, group: Any) -> int:
    """A group number as an int: 1.7 or True is a slip."""
    try:
        if isinstance(group, bool):
            raise TypeError
        return operator.index(group)
    except TypeError:
        raise PlanError(f"group {group!r} of axis {name!r} is no whole number: groups are counted from 0") from None


def _check(graph: DependencyGraph, name: str, numbers: tuple[int, ...]) -> None:
    if not isinstance(name, str):
        raise PlanError(f"groups are given by the name of their axis, a str, not by {type(name).__name__}")
    if name not in graph.widths.axes:
        raise PlanError(f"the graph has no axis {name!r}; graph.axes lists them")
    axis = graph[name]
    if numbers[0] < 0 or numbers[-1] >= axis.size:
        raise PlanError(
            f"axis {name!r} has groups 0 to {axis.size - 1}; the plan removes {numbers[0]} to {numbers[-1]}"
        )
    fixed = [g for g in numbers if g in axis.reasons]
    if fixed:
        raise PlanError(f"group {fixed[0]} of axis {name!r} can't go: {axis.reasons[fixed[0]]}")
    if len(numbers) >= axis.size:
        raise PlanError(f"the plan removes all {axis.size} groups of axis {name!r}: at least one must stay")
