"""Which dims of a program's inputs a dim comes from: what says where the samples and the tokens of a batch are in any value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from torch.fx import Node

from depgraph.capture.lowering import INPUT, OUTPUT
from depgraph.graph import Program
from depgraph.operators import without_overload

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Given = frozenset[tuple[int, int]]
"""Dims of inputs: the number of the input among the leaves of a call, and the dim of it."""


class Factor(NamedTuple):
    """A dim, or one of the dims that were laid out as one: its size, and the dims of inputs that it is aligned with."""

    size: int
    given: Given


Factors = tuple[Factor, ...]
"""The factors of a dim, the outermost first."""

NOWHERE: Given = frozenset()
PICKED: Given = frozenset([(-1, -1)])
"""Of a dim along which rows were picked: no input has it, nor says anything about their order."""

_PICKS = frozenset(
    f"aten.{name}" for name in ("index", "_unsafe_index", "index_select", "gather", "take_along_dim", "masked_select")
)


def picks(nodes: Iterable[Node], program: Program) -> Iterator[tuple[Node, frozenset[int]]]:
    """Each operator that picks from what it is given, and the dims (representatives) of what it makes that aren't dims of that."""
    find, values = program.relations.find, program.values
    for node in nodes:
        name = without_overload(node.target)
        if name in _PICKS and node.name in values and node.all_input_nodes[0].name in values:
            source = {find(dim) for dim in values[node.all_input_nodes[0].name].dims}
            yield node, frozenset(find(dim) for dim in values[node.name].dims if find(dim) not in source)


class Origins:
    """Where the dims of a program's values come from; `inputs` names the leaves of a call, in their order; `nodes` are its operators."""

    def __init__(self, program: Program, inputs: Sequence[str], nodes: Iterable[Node] = ()) -> None:
        self.program = program
        self.inputs = inputs
        self._picked = frozenset[int]().union(*(dims for _, dims in picks(nodes, program)))
        self._known: dict[str, tuple[Factors, ...]] = {}

    @cached_property
    def _given(self) -> dict[int, Given]:
        """The dims of inputs by the representatives of their classes."""
        found: dict[int, Given] = {}
        for number, name in enumerate(self.inputs):
            value = self.program.values.get(name)
            for dim, at in enumerate(value.dims if value is not None else ()):
                key = self.program.relations.find(at)
                found[key] = found.get(key, NOWHERE) | {(number, dim)}
        while sum(self._spread(found, parts) for parts in self._laid_out_alike):
            pass
        return found

    @cached_property
    def _laid_out_alike(self) -> list[list[int]]:
        """Dims that are the same part, of the same size, of one dim: representatives."""
        relations = self.program.relations
        ways: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for fold in relations.folds:
            sizes = (relations.sizes[part] for part in fold.parts)
            ways.setdefault((relations.find(fold.flat), *sizes), []).append(tuple(map(relations.find, fold.parts)))
        return [list(dict.fromkeys(parts)) for alike in ways.values() for parts in zip(*alike, strict=True)]

    @staticmethod
    def _spread(found: dict[int, Given], parts: list[int]) -> bool:
        """Give all parts what any of them comes from; was that news to one?"""
        before = [found.get(part, NOWHERE) for part in parts]
        every = NOWHERE.union(*before)
        found.update(dict.fromkeys(parts, every) if every else {})
        return any(one != every for one in before)

    @cached_property
    def _folds(self) -> dict[int, tuple[int, ...]]:
        """The dims that were laid out as one, where one of them comes from an input."""
        find, found = self.program.relations.find, dict[int, tuple[int, ...]]()
        for fold in self.program.relations.folds:
            if any(find(part) in self._given for part in fold.parts):
                found.setdefault(find(fold.flat), fold.parts)
        return found

    def of(self, name: str) -> tuple[Factors, ...]:
        """The factors of each dim of a value."""
        if name not in self._known:
            self._known[name] = tuple(self._factors(at) for at in self.program.values[name].dims)
        return self._known[name]

    def _factors(self, at: int) -> Factors:
        relations = self.program.relations
        key = relations.find(at)
        parts = (at,) if key in self._given else self._folds.get(key, (at,))
        return tuple(Factor(relations.sizes[p], self._place(relations.find(p))) for p in parts)

    def _place(self, key: int) -> Given:
        return self._given.get(key, PICKED if key in self._picked else NOWHERE)


def steps_first(graph: DependencyGraph) -> frozenset[str]:
    """The inputs along whose second dim the samples must lie: steps are first, as torch's recurrent layers and attention take them.

    Samples are alike: nothing is computed over them. Steps that are counted or attended to aren't. Where it is for the batch that
    something is computed (its mean, beside other outputs), an input [samples, 1] has its samples where the others have theirs.
    """
    program, number = graph.capture.program, graph.classes.of_dim
    relations, values = program.relations, program.values
    over = [dim for dim, _ in relations.mixed]
    over += [values[c.operand].dim(c.dim) for c in relations.contractions]
    over += [dim for dim, indices, reason in relations.fixed if indices is None and reason.why not in (INPUT, OUTPUT)]
    mixed = {int(number[dim]) for dim in over}
    pairs = {name: values[name].dims[:2] for name in graph.observer().own.inputs if name in values}
    found = {n for n, at in pairs.items() if len(at) > 1 and number[at[0]] in mixed and number[at[1]] not in mixed}
    others = {number[at[0]] for name, at in pairs.items() if at and name not in found}
    return frozenset(n for n in found if relations.sizes[pairs[n][1]] > 1 or number[pairs[n][0]] not in others)
