"""Axes whose groups are parts that the code takes one by one, as experts for a router's outputs: entries of a list, or slices
of stacked tensors.

Nothing in a captured forward says so for sure: the code may loop over the parts, compare with their numbers, or look one up
by a number that a tensor holds, and the example may pass most of them by. So a dim that nothing but its numbers fixes, and what
holds as many parts alike near what makes it, are tried: every other index leaves, and the model must compute what it computes
when it can't choose them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from depgraph.axes import Axis, Counted, Entries, Member, axis_of, owners_of
from depgraph.capture.sizes import Attr
from depgraph.classes import NONE
from depgraph.coupling import Labelling, find_axes
from depgraph.cutting.entries import in_order
from depgraph.cutting.experts import Expected, Whole, check_without, expected, leaving, taken, whole
from depgraph.cutting.rerunning import Inputs
from depgraph.cutting.shortening import shorten
from depgraph.holders import HARD, Holder, Holders, ListOfParts, StackOfParts
from depgraph.widths import Widths

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_MOST_TRIALS = 64
_UNTRIED = "a trial tells whether parts of the model go with it, which needs weights: trace the model with some"


def with_experts(graph: DependencyGraph) -> list[Axis]:
    """The axes of a graph and those that take parts along, tried; a model without values has none of these, and is told so.

    Such an axis takes the place of one that has the same groups and can't lose any.
    """
    holders = Holders(graph, owners_of(graph.capture.program, graph.classes))
    if any(t.is_meta for t in graph.tensors().values()):
        _say_untried(graph, holders)
        return graph.axes
    candidates = list(_candidates(holders)) if holders.found else []
    before = graph.widths
    try:
        return _beside(graph.axes, _Trial(graph, candidates).passed()) if candidates else graph.axes
    finally:
        graph.widths = before


def _say_untried(graph: DependencyGraph, holders: Holders) -> None:
    """Add to the reasons that fix what parts may stand for that a trial would tell, which takes values."""
    fixed = graph.classes.fixed_whole
    for number, near in holders.together.items():
        if number in fixed and _labellings(graph, number, near):
            stacks = [one.number for one in near if isinstance(one, StackOfParts) and one.number in fixed]
            for known in {number, *stacks}:
                fixed[known] = replace(fixed[known], text=f"{fixed[known].text}; {_UNTRIED}", why=_UNTRIED)


def _beside(axes: list[Axis], found: list[Axis]) -> list[Axis]:
    """The axes found behind the others, or in the place of those that they are named after.

    What can lose nothing and is reached by them is left out.
    """
    named, reached = {axis.name: axis for axis in found}, {number for axis in found for number in axis.labels}
    left = [axis for axis in axes if axis.name in named or axis.prunable.any() or not reached.issuperset(axis.labels)]
    return [named.pop(axis.name, axis) for axis in left] + list(named.values())


@dataclass(frozen=True)
class _Candidate:
    """An axis that may take parts along, in the versions that differ in what follows."""

    versions: tuple[Axis, ...]

    def removal(self, graph: DependencyGraph) -> dict[str, tuple[int, ...]]:
        """Every other group, as far as enough stay."""
        axis = self.versions[0]
        most = axis.size - graph.widths.least(axis.name)
        groups = tuple(np.flatnonzero(axis.prunable)[::2].tolist())[:most]
        return {axis.name: groups} if groups else {}


def _candidates(holders: Holders) -> Iterator[_Candidate]:
    """For every class of dims that is as large as holders near what makes it: the axis from there, with these."""
    graph = holders.graph
    names = {axis.name: 1 for axis in graph.axes}
    for number, near in holders.together.items():
        for found in _labellings(graph, number, near):
            axis = axis_of(found, holders.owners, graph.classes, names)
            labels = axis.labels.pop(len(graph.classes.size))
            same = (
                a for a in graph.axes if number in a.labels and np.array_equal(a.labels[number], axis.labels[number])
            )
            known = next(same, None)
            if known is None or not known.prunable.any():
                axis = axis if known is None else replace(axis, name=known.name)
                known_as = [axis.labels[number], labels]
                choices = _choices(near) if number in holders.routing else [near]
                yield _Candidate(tuple(v for some in choices for v in _versions(graph, axis, some, known_as)))


def _choices(near: list[Holder]) -> list[list[Holder]]:
    """Which holders may be meant: all, those but lists of parameters, or all but one of these, which may be about something else."""
    loose = [one for one in near if isinstance(one, ListOfParts) and one.loose]
    found = [near, [one for one in near if one not in loose], *([o for o in near if o is not one] for one in loose)]
    return [some for k, some in enumerate(found) if some and some not in found[:k]]


def _labellings(graph: DependencyGraph, number: int, near: list[Holder]) -> list[Labelling]:
    """The axes from parts, of which each stands for an index of a class of dims, as if nothing fixed that.

    None where more than its numbers does. The parts are a class of their own, behind the last.
    """
    classes, size = graph.classes, near[0].size
    parts, every = len(classes.size), np.arange(size)
    pushes = defaultdict(list, classes.pushes)
    for other in {number, *(one.number for one in near if isinstance(one, StackOfParts))}:
        for a, b in ((parts, other), (other, parts)):
            pushes[a] = [*pushes[a], (every, b, every)]
    hard = {k: reason for k, reason in classes.fixed_whole.items() if reason.why in HARD}
    widened = replace(classes, size=[*classes.size, size], fixed_whole=hard, pushes=pushes)
    found = find_axes(widened, [parts], {number})
    whole = (axis for axis in found if parts in axis.labels and (axis.labels[parts] != NONE).all())
    return [axis for axis in whole if not any(reason.why in HARD for reason in axis.reasons.values())]


def _versions(graph: DependencyGraph, axis: Axis, near: list[Holder], known: list[np.ndarray]) -> Iterator[Axis]:
    """The axis with its entries, for each guess of which integers count them and how those with names are called.

    `known` are the labels of the indices that parts stand for, and of the parts.
    """
    lists = [(one, one.spread(known[-1])) for one in near if isinstance(one, ListOfParts)]
    groups = {
        name: group
        for one, spread in lists
        for names, group in zip(one.tensors, spread.tolist(), strict=True)
        for name in names
    }
    held = (v for v in graph.capture.program.values.values() if v.kind in ("parameter", "buffer") and v.shape)
    members = [
        *axis.members,
        *(Member(v.target, 0, v.kind, np.full(v.shape[0], groups[v.target])) for v in held if v.target in groups),
    ]
    axis = replace(axis, members=tuple(members), reasons={}, tried=True)
    named = any(not in_order(graph.model.get_submodule(one.path)) for one, _ in lists)
    for counted in _counts(graph, axis, near, known):
        for keys in ("own", "first") if named else ("own",):
            entries = tuple(Entries(one.path, spread, one.tensors, one.nodes, keys) for one, spread in lists)
            yield replace(axis, entries=entries, counted=counted)


def _counts(
    graph: DependencyGraph, axis: Axis, near: list[Holder], known: list[np.ndarray]
) -> list[tuple[Counted, ...]]:
    """Guesses of which integers of the modules around count the parts, or the indices that these stand for, with these labels:

    those that are as many, and no sizes; all; none.
    """
    paths = _around(
        [*(path for one in near for path in one.where), *(m.target.rpartition(".")[0] for m in axis.members)]
    )
    sized, labels = frozenset(graph.sizes.users), {len(one): one for one in known}
    found = [
        Counted(Attr(path, name, ()), labels[value])
        for path in paths
        if not type(graph.model.get_submodule(path)).__module__.startswith("torch.nn.")
        for name, value in vars(graph.model.get_submodule(path)).items()
        if type(value) is int and value in labels and not name.startswith("_")
    ]
    unsized = [counted for counted in found if counted.attr not in sized]
    guesses = [unsized, found, [], *([counted] for counted in found)]
    return list({tuple(c.attr for c in guess): tuple(guess) for guess in guesses}.values())


def _around(paths: list[str]) -> list[str]:
    """The modules at these paths, and those that hold them up to one that holds all."""
    split = [path.split(".") for path in dict.fromkeys(paths)]
    common = len(os.path.commonprefix(split))
    holding = ([".".join(parts[:k]) for k in range(common, len(parts) + 1)] for parts in split)
    return list(dict.fromkeys(path for found in holding for path in found))


class _Trial:
    """Takes parts out of the model, compares, and puts them back."""

    def __init__(self, graph: DependencyGraph, candidates: list[_Candidate]) -> None:
        self.graph = graph
        self.candidates = candidates
        self.left = _MOST_TRIALS

    @cached_property
    def given(self) -> list[Inputs]:
        """What the model is run on."""
        return taken(self.graph)

    @cached_property
    def whole(self) -> Whole:
        """What it gives as it is."""
        return whole(self.graph, self.graph.model, self.given)

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
            wanted = expected(graph, graph.model, removal, self.given, self.whole)
        except Exception:
            return []
        if not wanted.sensitivity > wanted.tolerance:  # whatever a version computes, nothing would show it
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
                check_without(graph, graph.model, wanted)
            finally:
                take_back()
        except Exception:  # whatever a model that isn't made for it comes to
            return False
        return True
