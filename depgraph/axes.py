"""Axes and groups as a user sees them: named, with their members, and with the reason why an index can't go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from depgraph.capture.sizes import Attr
from depgraph.classes import NONE, Classes
from depgraph.coupling import Labelling, find_axes
from depgraph.graph import Program, Reason, Value


@dataclass(frozen=True, eq=False)
class Member:
    """One dim of one parameter or buffer that an axis reaches.

    `labels[i]` is the group that index `i` of dimension `dim` belongs to, or -1 where the axis doesn't reach it.
    """

    target: str
    dim: int
    kind: str
    labels: np.ndarray = field(repr=False)

    def indices(self, group: int) -> np.ndarray:
        """The indices of this dim that go with `group`."""
        return np.flatnonzero(self.labels == group)


@dataclass(frozen=True, eq=False)
class Group:
    """The smallest part of an axis that can be removed: its members are (parameter, dim, indices)."""

    axis: str
    number: int
    members: tuple[tuple[str, int, np.ndarray], ...]
    fixed: Reason | None


@dataclass(frozen=True)
class Entries:
    """A container of modules whose entry k leaves, whole, with group `labels[k]` of an axis, as experts do; -1 stays.

    `tensors` names what each entry holds, `nodes` the operators that go with it. `keys` says which names those that have names
    of their own have afterwards: their "own", or the "first" ones.
    """

    container: str
    labels: np.ndarray = field(repr=False)
    tensors: tuple[frozenset[str], ...] = field(repr=False)
    nodes: tuple[frozenset[str], ...] = field(repr=False)
    keys: str = "own"

    def going(self, groups: Iterable[int]) -> list[int]:
        """The entries that leave with these groups, by position."""
        return np.flatnonzero(np.isin(self.labels, list(groups))).tolist()


@dataclass(frozen=True)
class Counted:
    """An integer of the model's modules that says how many indices there are, of which index k leaves with group `labels[k]`."""

    attr: Attr
    labels: np.ndarray = field(repr=False)

    def going(self, groups: Iterable[int]) -> np.ndarray:
        """Which indices leave with these groups, as a boolean array."""
        return np.isin(self.labels, list(groups))


@dataclass(frozen=True, eq=False)
class Axis:
    """A set of dims, across the whole model, that must be narrowed together.

    `size` is its number of groups, `exact` whether removing a group equals zeroing it, `mixed_by` the operators that make
    it inexact, `reasons` why certain groups can't go (by group number). An axis that was `tried` is one as a trial of the module
    showed, and not as operators say of dims: `entries` are whole modules that go with its groups, `counted` what counts them.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    reasons: dict[int, Reason]
    mixed_by: tuple[str, ...]
    labels: dict[int, np.ndarray] = field(repr=False)
    entries: tuple[Entries, ...] = ()
    tried: bool = False
    counted: tuple[Counted, ...] = ()

    @property
    def exact(self) -> bool:
        return not self.mixed_by

    @property
    def kind(self) -> str:
        """The name with its numbers starred: alike for the same axis of every layer."""
        return re.sub(r"\d+", "*", self.name)

    @property
    def prunable(self) -> np.ndarray:
        """Which groups may go, as a boolean array [size]."""
        free = np.ones(self.size, dtype=bool)
        free[list(self.reasons)] = False
        return free

    @property
    def why_fixed(self) -> str:
        """The first reason why a group of this axis can't go, or an empty string."""
        return str(next(iter(self.reasons.values()), ""))

    def group(self, number: int) -> Group:
        """One group with its members; raises IndexError when there is none of that number."""
        if not 0 <= number < self.size:
            raise IndexError(f"axis {self.name} has {self.size} groups, there is no group {number}")
        parts = ((m.target, m.dim, m.indices(number)) for m in self.members)
        return Group(self.name, number, tuple(p for p in parts if len(p[2])), self.reasons.get(number))

    @property
    def groups(self) -> Iterator[Group]:
        return (self.group(number) for number in range(self.size))


Owners = dict[int, list[tuple[Value, int]]]


def owners_of(program: Program, classes: Classes) -> Owners:
    """The dims of what the model holds, by their class."""
    owners: Owners = {}
    for value in program.values.values():
        if value.kind in ("parameter", "buffer", "constant") and value.target:
            for d, dim in enumerate(value.dims):
                owners.setdefault(int(classes.of_dim[dim]), []).append((value, d))
    return owners


def build_axes(program: Program, classes: Classes) -> list[Axis]:
    """Find all axes of a program that reach a parameter, in the order of the graph."""
    owners = owners_of(program, classes)
    seeds = [number for number, held in owners.items() if any(v.kind == "parameter" and v.used for v, _ in held)]
    names: dict[str, int] = {}
    return [axis_of(found, owners, classes, names) for found in find_axes(classes, seeds, set(seeds))]


def axis_of(found: Labelling, owners: Owners, classes: Classes, names: dict[str, int]) -> Axis:
    """An axis with its members, which are named and whose groups are numbered in the order in which they lie there."""
    reached = [n for n in owners if n in found.labels]
    renumber = _numbered(np.concatenate([found.groups(number) for number in reached]), len(found.root))
    labels = {number: renumber[found.groups(number)] for number in found.labels}
    members = tuple(Member(v.target, d, v.kind, labels[n]) for n in reached for v, d in owners[n])
    reasons = {int(renumber[g]): reason for g, reason in found.reasons.items() if renumber[g] != NONE}
    mixed = tuple(dict.fromkeys(classes.mixed[n] for n in found.labels if n in classes.mixed))
    return Axis(_name(members, names), int(renumber.max()) + 1, members, reasons, mixed, labels)


def _numbered(touched: np.ndarray, most: int) -> np.ndarray:
    """For each label up to `most`, and for NONE, its place among those in `touched`, in the order in which they come there."""
    first = np.full(most + 1, len(touched))
    first[touched[::-1]] = np.arange(len(touched))[::-1]
    first[NONE] = len(touched)
    in_order = np.argsort(first, kind="stable")[: int((first < len(touched)).sum())]
    renumber = np.full(most + 1, NONE)
    renumber[in_order] = np.arange(len(in_order))
    return renumber


def _name(members: tuple[Member, ...], taken: dict[str, int]) -> str:
    parameters = [m for m in members if m.kind == "parameter"] or members
    main = min(parameters, key=lambda m: (not _alone(m), m.dim != 0))
    name = f"{main.target}:{main.dim}{_suffix(main.labels)}"
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _alone(member: Member) -> bool:
    return bool((member.labels != NONE).all()) and _all_differ(member.labels)


def _suffix(labels: np.ndarray) -> str:
    """How the groups lie on the dim that names the axis: a slice of it, blocks of it, or positions within blocks."""
    on = np.flatnonzero(labels != NONE)
    used = labels[on]
    part = f"[{on[0]}:{on[-1] + 1}]" if len(on) < len(labels) else ""
    if _all_differ(used):
        return part
    return f"{part}/blocks" if (np.diff(used) >= 0).all() else f"{part}/within"


def _all_differ(labels: np.ndarray) -> bool:
    return not len(labels) or int(np.bincount(labels).max()) == 1
