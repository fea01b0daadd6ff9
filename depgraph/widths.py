"""What remains of every dim when groups go, and what the remainder costs: exact arithmetic on kept sizes.

A *removal* is a dict from axis name to the group numbers that go. An index of a dim stays if every axis that reaches it
keeps its group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from depgraph.axes import Axis
from depgraph.classes import NONE, Classes
from depgraph.graph import Program, Value

Removal = Mapping[str, Iterable[int]]


@dataclass(frozen=True)
class Cost:
    """Parameters (a tied parameter counts once), multiply-accumulates of the traced call, bytes of parameters and buffers."""

    params: int
    macs: int
    bytes: int

    def share_of(self, other: Cost) -> dict[str, float]:
        """Each figure divided by that of `other`."""
        return {k: getattr(self, k) / max(getattr(other, k), 1) for k in ("params", "macs", "bytes")}


class Widths:
    """Kept indices and sizes of the classes of dims, for one program and its axes."""

    def __init__(self, program: Program, classes: Classes, axes: list[Axis]) -> None:
        self.program = program
        self.classes = classes
        self.axes = {axis.name: axis for axis in axes}
        self._steps: dict[str, int] = {}
        self._reach: dict[str, Reach] = {}
        self.reaching: dict[int, list[str]] = defaultdict(list)
        for axis in axes:
            for number in axis.labels:
                self.reaching[number].append(axis.name)
        stored = stored_values(program)
        self._stored = self._table([value.dims for value in stored])
        self._itemsizes = np.array([value.itemsize for value in stored], dtype=np.int64)
        self._is_parameter = np.array([value.kind == "parameter" for value in stored], dtype=bool)
        self._work = self._table([work.dims for work in program.relations.work])
        self._targets = [value.target for value in stored]

    def least(self, name: str) -> int:
        """How many groups of an axis must stay for operators that pick some of its indices, if each axis does its share."""
        axis, stay = self.axes[name], 1
        for least in self.program.relations.least:
            number = self.class_of(least.dim)
            if number not in axis.labels:
                continue
            labels, size = axis.labels[number], self.classes.size[number]
            share = (least.count / size) ** (1 / len(self.reaching[number]))
            counts = np.cumsum(np.sort(np.bincount(labels[labels != NONE], minlength=axis.size)))
            needed = math.ceil(share * size - 1e-9) - int((labels == NONE).sum())
            stay = max(stay, int(np.searchsorted(counts, needed)) + 1)
        return min(stay, axis.size)

    def step(self, name: str) -> int:
        """Of how many groups of an axis a multiple must stay, for operators that take only some sizes."""
        if name not in self._steps:
            self._steps[name] = self._step(self.axes[name])
        return self._steps[name]

    def _step(self, axis: Axis) -> int:
        found = 1
        for step in self.program.relations.steps:
            number = self.class_of(step.dim)
            if number in axis.labels and self._share_out(number, step.size):
                counts = np.bincount(axis.labels[number][axis.labels[number] != NONE], minlength=axis.size)
                if (counts == counts[0]).all():
                    found = math.lcm(found, step.size // math.gcd(step.size, int(counts[0])))
        return found

    def _share_out(self, number: int, step: int) -> bool:
        """Does each index of a class go with one axis at most, and has each of several axes a multiple of `step` of them?"""
        reach = [self.axes[name].labels[number] != NONE for name in self.reaching[number]]
        return len(reach) == 1 or int(np.sum(reach, 0).max()) == 1 and not any(int(r.sum()) % step for r in reach)

    @cached_property
    def sizes(self) -> np.ndarray:
        """The sizes of all classes of dims, followed by a 1."""
        return np.array([*self.classes.size, 1], dtype=np.int64)

    def reach(self, name: str) -> Reach:
        """The classes of dims that an axis reaches."""
        if name not in self._reach:
            axis = self.axes[name]
            alone = [n for n in axis.labels if len(self.reaching[n]) == 1]
            rows = [np.bincount(axis.labels[n] + 1, minlength=axis.size + 1)[1:] for n in alone]
            counts = np.array(rows, dtype=np.int64).reshape(len(alone), axis.size)
            self._reach[name] = Reach(alone, counts, [n for n in axis.labels if len(self.reaching[n]) > 1])
        return self._reach[name]

    def _table(self, runs: list[Sequence[int]]) -> np.ndarray:
        """The classes of some runs of dims, a row each, filled up with the number of a class of size 1."""
        table = np.full((len(runs), max(map(len, runs), default=0)), len(self.classes.size), dtype=np.int64)
        for row, dims in zip(table, runs, strict=True):
            row[: len(dims)] = self.classes.of_dim[list(dims)]
        return table

    def cost(self, sizes: np.ndarray, tensors: frozenset[str] = frozenset(), ops: frozenset[str] = frozenset()) -> Cost:
        """What the program costs, without some tensors and operators, when its classes have these sizes, followed by a 1."""
        numel = sizes[self._stored].prod(axis=1)
        if tensors:
            numel = numel * np.array([target not in tensors for target in self._targets])
        params, stored = int(numel[self._is_parameter].sum()), int((numel * self._itemsizes).sum())
        work = sizes[self._work].prod(axis=1)
        if ops:
            work = work * np.array([w.op not in ops for w in self.program.relations.work])
        return Cost(params, int(work.sum()), stored)

    @cached_property
    def _numbers(self) -> list[int]:
        """The numbers of all dims' classes as a list, which gives single ones faster than an array."""
        return self.classes.of_dim.tolist()

    @cached_property
    def named(self) -> list[tuple[str, Value]]:
        """The values of the program, by all names that they have in the graph."""
        return list(self.program.values.items())

    @cached_property
    def holding(self) -> dict[int, list[int]]:
        """For each class of dims the places in `named` of the values that have one of it."""
        found: dict[int, list[int]] = defaultdict(list)
        for place, (_, value) in enumerate(self.named):
            for number in {self._numbers[dim] for dim in value.dims}:
                found[number].append(place)
        return found

    def class_of(self, dim: int) -> int:
        return self._numbers[dim]

    def axes_of(self, dim: int) -> list[str]:
        """Names of the axes that reach a dim."""
        return self.reaching.get(self.class_of(dim), [])

    def at(self, removal: Removal) -> Kept:
        """What `removal` leaves."""
        masks = {}
        for name, groups in removal.items():
            mask = np.zeros(self.axes[name].size + 1, dtype=bool)
            mask[groups if isinstance(groups, np.ndarray) else list(groups)] = True
            mask[NONE] = False
            masks[name] = mask
        return Kept(self, masks)


class Reach(NamedTuple):
    """The classes of dims that one axis reaches: those that it reaches `alone`, and those that others reach too.

    counts: how many indices every group has in each of the former, an array of classes x groups.
    """

    alone: list[int]
    counts: np.ndarray
    shared: list[int]


class Gone(NamedTuple):
    """What goes with whole modules: the names of tensors, and of operators."""

    tensors: frozenset[str]
    ops: frozenset[str]


class Kept:
    """The dims of a program after a removal; kept indices are found when asked for.

    `left_out` are names of branches and blocks that go besides: sizes are those of the dims as if these stayed.
    """

    def __init__(self, widths: Widths, masks: dict[str, np.ndarray], left_out: frozenset[str] = frozenset()) -> None:
        self.widths = widths
        self.masks = masks
        self.left_out = left_out
        self._kept: dict[int, np.ndarray | None] = {}

    def of_class(self, number: int) -> np.ndarray | None:
        """Kept indices of a class of dims, ascending; None when all stay."""
        if number not in self._kept:
            self._kept[number] = self._find(number)
        return self._kept[number]

    def _find(self, number: int) -> np.ndarray | None:
        gone: np.ndarray | None = None
        for name in self.widths.reaching.get(number, ()):
            if name in self.masks:
                here = self.masks[name][self.widths.axes[name].labels[number]]
                gone = here if gone is None else gone | here
        return np.flatnonzero(~gone) if gone is not None and gone.any() else None

    def of(self, value: Value, d: int) -> np.ndarray | None:
        """Kept indices of dimension `d` of a value; None when all stay."""
        return self.of_class(self.widths.class_of(value.dim(d)))

    def size(self, dim: int) -> int:
        """The size of a dim after the removal."""
        kept = self.of_class(self.widths.class_of(dim))
        return self.widths.program.relations.sizes[dim] if kept is None else len(kept)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value after the removal."""
        return tuple(self.size(dim) for dim in value.dims)

    def shapes(self, values: Iterable[Value]) -> Iterator[tuple[int, ...]]:
        """The shapes of many values after the removal."""
        sizes = self.class_sizes()[self.widths.classes.of_dim].tolist()
        return (tuple(sizes[value.dims.start : value.dims.stop]) for value in values)

    @cached_property
    def gone(self) -> Gone:
        """What the entries of lists of modules take along that leave with their groups."""
        tensors: set[str] = set()
        ops: set[str] = set()
        for name, mask in self.masks.items():
            for entries in self.widths.axes[name].entries:
                for k in np.flatnonzero(mask[entries.labels]):
                    tensors |= entries.tensors[k]
                    ops |= entries.nodes[k]
        return Gone(frozenset(tensors), frozenset(ops))

    def of_dims(self) -> Kept:
        """The same without the axes with which whole modules go."""
        masks = {n: m for n, m in self.masks.items() if not self.widths.axes[n].tried}
        return Kept(self.widths, masks, self.left_out)

    def is_same(self, other: Kept) -> bool:
        """Does `other` keep the same of the same graph?"""
        alike = (
            self.widths is other.widths and self.left_out == other.left_out and self.masks.keys() == other.masks.keys()
        )
        return alike and all(np.array_equal(mask, other.masks[name]) for name, mask in self.masks.items())

    def without(self, names: Iterable[str]) -> Kept:
        """The same, with branches and blocks of these names left out too."""
        more = self.left_out.union(names)
        return self if more == self.left_out else Kept(self.widths, self.masks, more)

    def smaller(self) -> dict[str, Value]:
        """The values of the program, by all names that they have in the graph, that the removal makes smaller."""
        changed = np.flatnonzero(self.class_sizes() != self.widths.sizes).tolist()
        places = sorted({place for number in changed for place in self.widths.holding.get(number, ())})
        return dict(map(self.widths.named.__getitem__, places))

    def class_sizes(self) -> np.ndarray:
        """The sizes of all classes of dims, followed by a 1."""
        sizes = self.widths.sizes.copy()
        for name, mask in self.masks.items():
            reach = self.widths.reach(name)
            sizes[reach.alone] -= reach.counts @ mask[:-1]
            for number in reach.shared:
                kept = self.of_class(number)
                if kept is not None:
                    sizes[number] = len(kept)
        return sizes

    def cost(self, tensors: frozenset[str] = frozenset(), ops: frozenset[str] = frozenset()) -> Cost:
        """Exact cost of what remains, without the named tensors and operators."""
        return self.widths.cost(self.class_sizes(), tensors | self.gone.tensors, ops | self.gone.ops)


def stored_values(program: Program) -> list[Value]:
    """Parameters and buffers, tied ones once."""
    firsts: dict[str, Value] = {}
    for value in program.values.values():
        if value.kind in ("parameter", "buffer"):
            firsts.setdefault(program.ties.get(value.target, value.target), value)
    return list(firsts.values())
