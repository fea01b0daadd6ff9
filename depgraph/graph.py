"""The one graph that every door leads to: values, their dims, and what operators say about them.

A *value* is one tensor (activation, parameter, buffer, constant or input); a *dim* is one dimension of one value and is
known by an integer. Operators are lowered to three relations between dims (DESIGN.md, "Relations"):

* aligned: index ``ia[k]`` of one dim is index ``ib[k]`` of another (`Relations.align`, `Relations.align_at`);
* reshaped: a run of dims is refolded into another run with the same product (`Relations.refold`);
* fixed: an index can't go, and the reason is kept (`Relations.fix`).

Whole dims that are aligned index by index are merged at once, so that a class of dims is stored instead of its edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

Kind = Literal["parameter", "buffer", "constant", "input", "activation"]


@dataclass(slots=True)
class Value:
    """One tensor of the captured graph. `first` is the id of its first dim; the others follow.

    A value that is not `used` is held by the model, but the captured forward never reads it. Where its numbers are indices
    of some dim, that dim is its `domain`.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    first: int
    itemsize: int = 4
    target: str = ""
    module: str = ""
    where: str = ""
    used: bool = True
    domain: int | None = None

    @property
    def dims(self) -> range:
        return range(self.first, self.first + len(self.shape))

    def dim(self, d: int) -> int:
        """The id of dimension `d`, counted from the end when negative."""
        if not self.shape:
            raise IndexError(f"{self.name} has no dimension {d}: it is a scalar")
        return self.first + d % len(self.shape)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an index can't go: a sentence, and the name under which a custom (not a necessity) can be lifted.

    `why` is the sentence without places and names, alike for all reasons of one kind.
    """

    text: str
    lift: str = ""
    why: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def free(self) -> str:
        """The lift where users may name it; numbers that point into a dim are lifted by what translates them, a vocabulary."""
        return self.lift if self.lift.startswith(("output ", "input ")) else ""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Index ``ia[k]`` of dim `a` and index ``ib[k]`` of dim `b` go together."""

    a: int
    ia: np.ndarray
    b: int
    ib: np.ndarray


@dataclass(frozen=True, slots=True)
class Fold:
    """Dim `flat` is the row-major product of the dims `parts`."""

    flat: int
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contraction:
    """Operand `operand` (a value) of operator `op` is summed over its dimension `dim`: zeros there add nothing.

    `product` tells apart the products that one operator takes; the operands of one product meet in it.
    """

    op: str
    operand: str
    dim: int
    product: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """The multiply-accumulates of operator `op`: the product of the sizes of `dims`."""

    op: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Least:
    """An operator picks `count` of the indices of `dim`, so that many must stay."""

    dim: int
    count: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Step:
    """An operator's kernel takes only sizes of `dim` that are a multiple of `size`."""

    dim: int
    size: int
    reason: Reason


@dataclass
class Relations:
    """All that the operators of one graph say about its dims."""

    sizes: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    alignments: list[Alignment] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    fixed: list[tuple[int, np.ndarray | None, Reason]] = field(default_factory=list)
    mixed: list[tuple[int, str]] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    constant: set[int] = field(default_factory=set)
    """Dims along which their value is the same at every index, as far as rules know (it was expanded from size 1)."""
    least: list[Least] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def new_dim(self, size: int) -> int:
        """A further dim of `size`; those that belong to no value are the letters inside brackets."""
        self.sizes.append(size)
        self.parent.append(len(self.parent))
        return len(self.sizes) - 1

    def find(self, dim: int) -> int:
        """The representative of the class of dims that `dim` is aligned with as a whole."""
        parent = self.parent
        while parent[dim] != dim:
            parent[dim] = parent[parent[dim]]
            dim = parent[dim]
        return dim

    def align(self, a: int, b: int) -> None:
        """All indices of `a` and `b` go together; a dim of size 1 broadcasts and says nothing."""
        if self.sizes[a] != self.sizes[b]:
            if 1 in (self.sizes[a], self.sizes[b]):
                return
            raise ValueError(f"dims of sizes {self.sizes[a]} and {self.sizes[b]} can't be aligned")
        ra, rb = self.find(a), self.find(b)
        if ra != rb:
            self.parent[max(ra, rb)] = min(ra, rb)

    def align_at(self, a: int, ia: np.ndarray, b: int, ib: np.ndarray) -> None:
        """Index ``ia[k]`` of `a` and ``ib[k]`` of `b` go together; indices that aren't named are free."""
        if not len(ia):
            return
        if np.max(ia) >= self.sizes[a] or np.max(ib) >= self.sizes[b]:
            raise ValueError(f"dims of sizes {self.sizes[a]} and {self.sizes[b]} have no such indices")
        if self.sizes[a] == self.sizes[b] == len(ia) and _is_identity(ia) and _is_identity(ib):
            self.align(a, b)
            return
        self.alignments.append(Alignment(a, np.asarray(ia), b, np.asarray(ib)))

    def fold(self, flat: int, parts: list[int]) -> None:
        """Dim `flat` is the row-major product of `parts`; parts of size 1 are left out."""
        if math.prod(self.sizes[p] for p in parts) != self.sizes[flat] or self.sizes[flat] < 0:
            sizes = " x ".join(str(self.sizes[p]) for p in parts)
            raise ValueError(f"a dim of size {self.sizes[flat]} isn't {sizes}")
        parts = [p for p in parts if self.sizes[p] != 1]
        if len(parts) > 1:
            self.folds.append(Fold(flat, tuple(parts)))
        elif parts:
            self.align(flat, parts[0])

    def refold(self, before: list[int], after: list[int]) -> None:
        """The run of dims `before` is laid out anew as `after`, in row-major order and with the same product."""
        for left, right in _blocks(self.sizes, before, after):
            if len(left) == 1 or len(right) == 1:
                flat, parts = (left[0], right) if len(left) == 1 else (right[0], left)
                self.fold(flat, parts)
                continue
            if not self._share_factors(left, right):
                flat = self.new_dim(math.prod(self.sizes[d] for d in left))
                self.fold(flat, left)
                self.fold(flat, right)

    def _share_factors(self, left: list[int], right: list[int]) -> bool:
        """Fold both runs over common factors, (6, 4) and (3, 8) over 3, 2, 4; False where their boundaries don't divide."""
        ends = {d: math.prod(self.sizes[e] for e in run[: k + 1]) for run in (left, right) for k, d in enumerate(run)}
        cuts = [1, *sorted(set(ends.values()))]
        if len(ends) < len(left) + len(right) or any(b % a for a, b in pairwise(cuts)):
            return False
        factors = {b: self.new_dim(b // a) for a, b in pairwise(cuts)}
        for run in (left, right):
            for d in run:
                begin = ends[d] // self.sizes[d]
                self.fold(d, [factors[c] for c in cuts if begin < c <= ends[d]])
        return True

    def fix(self, dim: int, reason: Reason, indices: np.ndarray | None = None) -> None:
        """The given indices of `dim` (all of them by default) can't go."""
        self.fixed.append((dim, indices, reason))

    def mix(self, dim: int, why: str) -> None:
        """An operator mixes all indices of `dim` (a norm, a softmax): cutting isn't the same as zeroing."""
        self.mixed.append((dim, why))


def _is_identity(indices: np.ndarray) -> bool:
    return bool(
        len(indices) == 0 or (indices[0] == 0 and indices[-1] == len(indices) - 1 and np.all(np.diff(indices) == 1))
    )


def _blocks(sizes: list[int], before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Split two runs with one product into the smallest pairs of runs whose products agree."""
    left = [d for d in before if sizes[d] != 1]
    right = [d for d in after if sizes[d] != 1]
    blocks = []
    i = j = 0
    while i < len(left) and j < len(right):
        run_left, run_right = [left[i]], [right[j]]
        product_left, product_right = sizes[left[i]], sizes[right[j]]
        i, j = i + 1, j + 1
        while product_left != product_right:
            if product_left < product_right:
                product_left *= sizes[left[i]]
                run_left.append(left[i])
                i += 1
            else:
                product_right *= sizes[right[j]]
                run_right.append(right[j])
                j += 1
        blocks.append((run_left, run_right))
    return blocks


@dataclass
class Program:
    """A captured model after lowering: its values by name, and the relations between their dims."""

    values: dict[str, Value] = field(default_factory=dict)
    relations: Relations = field(default_factory=Relations)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    """Inputs whose sizes may be lifted, by name, such as "input 1"."""
    by_products: set[str] = field(default_factory=set)
    """Names, such as "output 1", of outputs that another output is computed from."""

    def unread(self) -> list[Value]:
        """The parameters that the captured forward reads under none of their names."""
        held = [value for value in self.values.values() if value.kind == "parameter"]
        read = {self.ties.get(value.target, value.target) for value in held if value.used}
        return [value for value in held if self.ties.get(value.target, value.target) not in read]

    def add(self, value_name: str, kind: Kind, shape: tuple[int, ...], **more: object) -> Value:
        """Register a value and its dims."""
        first = len(self.relations.sizes)
        for size in shape:
            self.relations.new_dim(size)
        value = Value(value_name, kind, shape, first, **more)  # type: ignore[arg-type]
        self.values[value_name] = value
        return value
