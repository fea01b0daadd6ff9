"""Axes that take whole modules along: the entries of a list that stand for the indices of a dim, as experts for a router's.

Nothing in a captured forward says so for sure: the code may loop over the entries, compare with their numbers, or look one up
by a number that a tensor holds, and the example may pass most of them by. So a dim that nothing but its numbers fixes, and a
list of as many modules alike near what makes it, are tried: every other index leaves, and the model must compute what it
computes when it can't choose them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from depgraph.axes import Axis, Entries, Member, Owners, axis_of, owners_of
from depgraph.capture.exported import decisions_of
from depgraph.capture.lowering import GIVEN, INPUT, OUTPUT
from depgraph.capture.places import module_path
from depgraph.capture.sizes import Attr
from depgraph.classes import NONE
from depgraph.coupling import Labelling, find_axes
from depgraph.cutting.experts import Expected, check_without, expected, leaving
from depgraph.cutting.shortening import shorten
from depgraph.widths import Widths

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_HARD = frozenset([INPUT, OUTPUT, GIVEN])
_MOST_TRIALS = 64


@dataclass(frozen=True)
class _List:
    """A list or dict of modules that are alike and share nothing: its path, and by entry what it holds and computes."""

    path: str
    tensors: tuple[frozenset[str], ...]
    nodes: tuple[frozenset[str], ...]

    @property
    def owner(self) -> str:
        return self.path.rpartition(".")[0]

    def holds(self, target: str) -> bool:
        return target.startswith(f"{self.path}.")


def with_experts(graph: DependencyGraph) -> list[Axis]:
    """The axes of a graph and those that take entries of lists along, tried; none of these for a model without values.

    Such an axis takes the place of one that has the same groups and can't lose any.
    """
    if any(t.is_meta for t in graph.tensors().values()):
        return graph.axes
    lists = list(_lists(graph))
    candidates = list(_candidates(graph, lists)) if lists else []
    before = graph.widths
    try:
        return _beside(graph.axes, _Trial(graph, candidates).passed()) if candidates else graph.axes
    finally:
        graph.widths = before


def _beside(axes: list[Axis], found: list[Axis]) -> list[Axis]:
    """The axes found behind the others, or in the place of those that they are named after."""
    named = {axis.name: axis for axis in found}
    return [named.pop(axis.name, axis) for axis in axes] + list(named.values())


def _lists(graph: DependencyGraph) -> Iterator[_List]:
    ties, named = graph.capture.program.ties, dict[str, set[str]]()
    for name, first in ties.items():
        named.setdefault(first, set()).add(name)
    held, computed = _by_module((name, name) for name in ties), _computed(graph)
    for path, module in graph.model.named_modules():
        entries = list(module._modules.items()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
        if len(entries) < 2 or len({_kind(entry) for _, entry in entries}) > 1:
            continue
        paths = [f"{path}.{key}" if path else key for key, _ in entries]
        tensors = tuple(frozenset(held.get(one, ())) for one in paths)
        if all(names and all(named[ties[name]] <= names for name in names) for names in tensors):
            yield _List(path, tensors, tuple(frozenset(computed.get(one, ())) for one in paths))


def _computed(graph: DependencyGraph) -> dict[str, set[str]]:
    """The operators that go with a module, by its path: none where inputs decide, as others are computed instead."""
    if decisions_of(graph.capture.exported) is not None:
        return {}
    return _by_module((f"{module_path(node)}.", node.name) for node in graph.capture.exported.graph.nodes)


def _by_module(named: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """What lies within each module, by its path, from pairs of the path of something in it and what that is."""
    found: dict[str, set[str]] = {}
    for path, what in named:
        outer = path.rpartition(".")[0]
        while outer:
            found.setdefault(outer, set()).add(what)
            outer = outer.rpartition(".")[0]
    return found


def _kind(entry: nn.Module | None) -> object:
    """Its class, and what it holds: of any size, as other cuts may have narrowed some entries."""
    if entry is None:
        return None
    named = [*entry.named_parameters(), *entry.named_buffers()]
    return type(entry), tuple((name, tensor.ndim) for name, tensor in named)


@dataclass(frozen=True)
class _Candidate:
    """An axis that may take entries along, in the versions that differ in what follows."""

    versions: tuple[Axis, ...]

    def removal(self, graph: DependencyGraph) -> dict[str, tuple[int, ...]]:
        """Every other group, as far as enough stay."""
        axis = self.versions[0]
        most = axis.size - graph.widths.least(axis.name)
        groups = tuple(range(0, axis.size, 2))[:most]
        return {axis.name: groups} if groups else {}


def _candidates(graph: DependencyGraph, lists: list[_List]) -> Iterator[_Candidate]:
    """For every class of dims that is as large as lists near what makes it: the axis from there, with the lists."""
    program = graph.capture.program
    owners = owners_of(program, graph.classes)
    made = {int(graph.classes.of_dim[d]) for v in program.values.values() if v.kind == "activation" for d in v.dims}
    together: dict[int, list[_List]] = {}
    for one in lists:
        for number in _nearest(graph, {k: held for k, held in owners.items() if k in made}, one):
            together.setdefault(number, []).append(one)
    names = {axis.name: 1 for axis in graph.axes}
    for number, near in together.items():
        for found in _labellings(graph, number):
            axis = axis_of(found, owners, graph.classes, names)
            labels = axis.labels[number]
            same = (a for a in graph.axes if number in a.labels and np.array_equal(a.labels[number], labels))
            known = next(same, None)
            if known is None or not known.prunable.any():
                axis = axis if known is None else replace(axis, name=known.name)
                yield _Candidate(tuple(_versions(graph, axis, labels, near)))


def _nearest(graph: DependencyGraph, owners: Owners, one: _List) -> list[int]:
    """The classes of fixed dims as large as a list, of the parameters outside of it that lie nearest to it."""
    size, near = len(one.tensors), dict[int, int]()
    for number, held in owners.items():
        fixed = number in graph.classes.fixed_whole or number in graph.classes.fixed
        if graph.classes.size[number] == size and fixed:
            outside = [v for v, _ in held if v.kind == "parameter" and v.used and not one.holds(v.target)]
            if outside and len(outside) == len([v for v, _ in held if v.kind == "parameter"]):
                near[number] = max(_shared(one.owner, v.target.rpartition(".")[0]) for v in outside)
    return [number for number, depth in near.items() if depth == max(near.values())]


def _shared(one: str, other: str) -> int:
    """How many parts two paths share at their beginning."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _labellings(graph: DependencyGraph, number: int) -> list[Labelling]:
    """The axes from a class of dims as if nothing fixed it; none where more than its numbers does."""
    hard = {k: reason for k, reason in graph.classes.fixed_whole.items() if reason.why in _HARD}
    found = find_axes(replace(graph.classes, fixed_whole=hard), [number], {number})
    whole = (axis for axis in found if (axis.labels[number] != NONE).all())
    return [axis for axis in whole if not any(reason.why in _HARD for reason in axis.reasons.values())]


def _versions(graph: DependencyGraph, axis: Axis, labels: np.ndarray, near: list[_List]) -> Iterator[Axis]:
    """The axis with its entries, for each guess of which integers count them and how those of a dict are called."""
    groups = {
        name: group for one in near for names, group in zip(one.tensors, labels.tolist(), strict=True) for name in names
    }
    held = (v for v in graph.capture.program.values.values() if v.kind in ("parameter", "buffer") and v.shape)
    members = [
        *axis.members,
        *(Member(v.target, 0, v.kind, np.full(v.shape[0], groups[v.target])) for v in held if v.target in groups),
    ]
    dicts = any(isinstance(graph.model.get_submodule(one.path), nn.ModuleDict) for one in near)
    for counts in _counts(graph, axis, near):
        for keys in ("own", "first") if dicts else ("own",):
            entries = tuple(
                Entries(one.path, labels, one.tensors, one.nodes, counts if k == 0 else (), keys)
                for k, one in enumerate(near)
            )
            yield replace(axis, members=tuple(members), reasons={}, entries=entries)


def _counts(graph: DependencyGraph, axis: Axis, near: list[_List]) -> list[tuple[Attr, ...]]:
    """Guesses of which integers of the modules around count the entries: those that are as many, and no sizes; all; none."""
    paths = _around([*(one.path for one in near), *(m.target.rpartition(".")[0] for m in axis.members)])
    sized = frozenset(graph.sizes.users)
    number = len(near[0].tensors)
    found = [
        Attr(path, name, ())
        for path in paths
        if not type(graph.model.get_submodule(path)).__module__.startswith("torch.nn.")
        for name, value in vars(graph.model.get_submodule(path)).items()
        if type(value) is int and value == number and not name.startswith("_")
    ]
    unsized = tuple(attr for attr in found if attr not in sized)
    guesses = [unsized, tuple(found), (), *((attr,) for attr in found)]
    return list(dict.fromkeys(guesses))


def _around(paths: list[str]) -> list[str]:
    """The modules at these paths, and those that hold them up to one that holds all."""
    split = [path.split(".") for path in dict.fromkeys(paths)]
    common = len(os.path.commonprefix(split))
    holding = ([".".join(parts[:k]) for k in range(common, len(parts) + 1)] for parts in split)
    return list(dict.fromkeys(path for found in holding for path in found))


class _Trial:
    """Takes entries out of the model, compares, and puts them back."""

    def __init__(self, graph: DependencyGraph, candidates: list[_Candidate]) -> None:
        self.graph = graph
        self.candidates = candidates
        self.left = _MOST_TRIALS

    def passed(self) -> list[Axis]:
        """The axes that can go: all at once in one version where that does, else each by itself."""
        together = self._version(self.candidates)
        if together and (len(together) == 1 or self._version(self.candidates[:1])):
            return together
        return [axis for candidate in self.candidates for axis in self._version([candidate])]

    def _version(self, candidates: list[_Candidate]) -> list[Axis]:
        """The axes in the first version that computes what it must; empty where none does, or nothing shows it."""
        graph, firsts = self.graph, [c.versions[0] for c in candidates]
        graph.widths = Widths(graph.capture.program, graph.classes, _beside(graph.axes, firsts))
        removal = {name: groups for c in candidates for name, groups in c.removal(graph).items()}
        if len(removal) < len(candidates) or not self.left:
            return []
        try:
            wanted = expected(graph, graph.model, removal)
        except Exception:
            return []
        for versions in zip_longest(*(c.versions for c in candidates)):
            axes = [axis or first for axis, first in zip(versions, firsts, strict=True)]
            if self.left and self._computes(axes, removal, wanted):
                return axes
        return []

    def _computes(self, axes: list[Axis], removal: dict[str, tuple[int, ...]], wanted: Expected) -> bool:
        graph = self.graph
        self.left -= 1
        graph.widths = Widths(graph.capture.program, graph.classes, _beside(graph.axes, axes))
        try:
            take_back = shorten(graph.model, leaving(graph, removal))
            try:
                check = check_without(graph, graph.model, wanted)
            finally:
                take_back()
        except Exception:  # whatever a model that isn't made for it comes to
            return False
        return check.sensitivity > check.tolerance
