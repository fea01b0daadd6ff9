"""Trimming a vocabulary: the rows of a table that integer inputs point into, and the outputs that count the same tokens.

By default such rows stay, since ids come from outside. `Vocabulary.keep` makes a plan that leaves the rows of given tokens
only, in the table and in the heads; the pruned model takes and gives new ids, which `depgraph.tokens.TokenMap` translates.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.capture.places import place
from depgraph.configs import Configs, of_library
from depgraph.errors import PlanError
from depgraph.operators import by_name, without_overload
from depgraph.plan import Plan
from depgraph.rules.domains import LOOKS_AT_SHAPES, MOVES

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.graph import Value

_LOOKUPS = {"aten.embedding": ("weight", "indices"), "aten.index_select": ("self", "index")}


@dataclass(frozen=True)
class Words:
    """A vocabulary that a graph is opened for.

    `dim` is the rows' of its table, `inputs` and `places` the names of the inputs that hold its ids and where they stand
    among all, `logits` the dims of outputs that count the same tokens, `lifts` the reasons for which it would be fixed.
    """

    dim: int
    inputs: tuple[str, ...]
    places: tuple[int, ...]
    logits: tuple[int, ...]
    lifts: frozenset[str]


class Head(NamedTuple):
    """Dimension `dim` of an output, which counts the tokens; `tied` to the table, or of the same size only."""

    output: str
    dim: int
    tied: bool

    def __str__(self) -> str:
        return f"{self.output}:{self.dim}"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model: `size` of them.

    `inputs` name the inputs that hold ids, `tables` the parameters whose rows ids point into, `heads` the dims of outputs
    that count tokens: those tied to a table, and floating ones of the same size that come out of a parameter. `elsewhere`
    tells where else ids are used, as numbers: then none may go.
    """

    graph: DependencyGraph = field(repr=False)
    size: int
    inputs: tuple[str, ...]
    tables: tuple[str, ...]
    heads: tuple[Head, ...]
    lookups: tuple[str, ...] = field(repr=False)
    elsewhere: tuple[str, ...] = ()
    padding: frozenset[int] = frozenset()

    def keep(self, token_ids: Iterable[int], *, heads: Iterable[str] | None = None) -> Plan:
        """A plan that leaves only these tokens; their new ids count them in ascending order.

        The check compares outputs with the original's at kept tokens. Where the example inputs hold ids that go, kept ones
        take their place there. A transformers model's config follows if one of its integers is the size.

        Args:
            token_ids: ids to keep, each once, in any order.
            heads: which of `heads` are logits of these tokens, as "output 0" or "output 0:2"; all of them by default.

        Raises:
            PlanError: an id is out of range, stands twice or is no whole number, none is given, the padding token isn't
                among them, a head isn't one, or ids are used as numbers, so that they can't change.
        """
        kept = self._checked(token_ids)
        chosen = self._chosen(heads)
        if self.elsewhere:
            raise PlanError(f"the ids of {self.inputs[0]!r} can't change: {self.elsewhere[0]}")
        program = self.graph.capture.program
        table = next(v for v in program.values.values() if v.target == self.tables[0])
        places, leaves = self._places(), pytree.tree_leaves((self.graph.args, self.graph.kwargs))
        lifts = {f"index {name}" for name in self.lookups} | {head.output for head in chosen}
        logits = tuple(program.outputs[head.output].dim(head.dim) for head in chosen)
        words = Words(table.dim(0), self.inputs, places, logits, frozenset(lifts))
        inputs, notes = _only_kept(leaves, places, kept), self._notes(leaves, places, kept)
        spec = pytree.tree_structure((self.graph.args, self.graph.kwargs))
        graph = self.graph.opened(words, pytree.tree_unflatten(inputs, spec))
        plan = Plan.of(graph, _removal(graph, words.dim, kept), notes)
        return replace(plan, config=_config(plan, self.size, len(kept)))

    def _checked(self, token_ids: Iterable[int]) -> np.ndarray:
        try:
            array = isinstance(token_ids, (torch.Tensor, np.ndarray))
            given = token_ids.flatten().tolist() if array else list(token_ids)  # type: ignore[attr-defined]
            ids = [operator.index(i) for i in given]
        except TypeError as error:
            raise PlanError(f"token ids are a list of whole numbers: {error}") from None
        if any(isinstance(i, bool) for i in given):
            raise PlanError("token ids are a list of whole numbers, not a mask: give mask.nonzero()")
        outside = [i for i in ids if not 0 <= i < self.size]
        if outside:
            raise PlanError(f"token {outside[0]} is none of the vocabulary's, 0 to {self.size - 1}")
        kept, counts = np.unique(np.array(ids, dtype=np.int64), return_counts=True)
        if (counts > 1).any():
            raise PlanError(f"token {kept[counts > 1][0]} is given twice")
        if not len(kept):
            raise PlanError("no token is left: give the ids to keep")
        missing = sorted(self.padding - set(kept.tolist()))
        if missing:
            raise PlanError(f"token {missing[0]} is the padding row of {self.tables[0]!r}: keep it")
        return kept

    def _chosen(self, heads: Iterable[str] | None) -> list[Head]:
        if heads is None:
            outputs = [head.output for head in self.heads if not head.tied]
            double = next((o for o in outputs if outputs.count(o) > 1), "")
            if double:
                names = ", ".join(str(head) for head in self.heads if head.output == double)
                raise PlanError(
                    f"several dims of {double} have as many indices as there are tokens: choose among heads={names}"
                )
            return list(self.heads)
        chosen = []
        for name in [heads] if isinstance(heads, str) else heads:
            found = [head for head in self.heads if name in (head.output, str(head))]
            if len(found) != 1:
                raise PlanError(
                    f"heads={name!r} names {len(found)} heads of this vocabulary: {', '.join(map(str, self.heads)) or 'it has none'}"
                )
            chosen += found
        left = [head for head in self.heads if head.tied and head not in chosen]
        if left:
            raise PlanError(f"{left[0]} is tied to {self.tables[0]!r}, so it is trimmed with it: name it too")
        return chosen

    def _places(self) -> tuple[int, ...]:
        names = _input_names(self.graph)
        return tuple(names.index(name) for name in self.inputs)

    def _notes(self, leaves: list[Any], places: tuple[int, ...], kept: np.ndarray) -> list[str]:
        there = [name for name, at in zip(self.inputs, places, strict=True) if not _holds(leaves[at], kept)]
        notes = [
            f"example input {name!r} holds tokens that go: the check ran on others in their place" for name in there
        ]
        if kept[-1] >= len(kept):
            notes.append(
                "tokenizers and settings that name tokens, such as where a text ends, hold old ids: see depgraph.TokenMap"
            )
        return notes


def find_vocabularies(graph: DependencyGraph) -> dict[str, Vocabulary]:
    """Every table that integer inputs point into, by the name of the first such input."""
    values = graph.capture.program.values
    nodes = [n for n in graph.capture.exported.graph.nodes if n.op == "placeholder" and n.name in _input_names(graph)]
    found: dict[int, _Found] = {}
    for node in nodes:
        uses = list(_uses(node))
        for use in uses:
            weight = _table(use, values)
            if weight is not None:
                one = found.setdefault(graph.widths.class_of(weight.dim(0)), _Found(weight))
                one.add(node.name, use, [u for u in uses if _table(u, values) is None])
    return {one.inputs[0]: one.vocabulary(graph) for one in found.values()}


def only_one(vocabularies: Mapping[str, Vocabulary]) -> Vocabulary:
    """The single one; raises PlanError otherwise."""
    if not vocabularies:
        raise PlanError("the model has no vocabulary: no integer input is looked up in a table of parameters")
    if len(vocabularies) > 1:
        names = ", ".join(f"{name!r} ({one.size} rows of {one.tables[0]})" for name, one in vocabularies.items())
        raise PlanError(f"the model has several vocabularies, choose one of graph.vocabularies: {names}")
    return next(iter(vocabularies.values()))


@dataclass
class _Found:
    """A table, and what points into it."""

    table: Value
    inputs: list[str] = field(default_factory=list)
    lookups: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    padding: set[int] = field(default_factory=set)

    def add(self, name: str, use: Node, others: list[Node]) -> None:
        if name not in self.inputs:
            self.inputs.append(name)
        self.lookups.append(use.name)
        row = by_name(use).get("padding_idx")
        self.padding |= {row} if row is not None and row >= 0 else set()
        self.elsewhere += [f"{place(o) or o.name} takes them for numbers ({o.target})" for o in others]

    def vocabulary(self, graph: DependencyGraph) -> Vocabulary:
        widths, program = graph.widths, graph.capture.program
        rows, size = widths.class_of(self.table.dim(0)), self.table.shape[0]
        held = [v for v in program.values.values() if v.kind == "parameter"]
        made = {widths.class_of(dim) for v in held for dim in v.dims}
        heads = tuple(
            Head(name, d, number == rows)
            for name, value in program.outputs.items()
            for d, number in enumerate(map(widths.class_of, value.dims))
            if value.shape[d] == size and number in made
        )
        tables = tuple(
            dict.fromkeys(v.target for v in held if v.shape and widths.class_of(v.dim(0)) == rows and v.target)
        )
        first = (self.table.target, *(t for t in tables if t != self.table.target))
        return Vocabulary(
            graph,
            size,
            tuple(self.inputs),
            first,
            heads,
            tuple(self.lookups),
            tuple(self.elsewhere),
            frozenset(self.padding),
        )


def _input_names(graph: DependencyGraph) -> list[str]:
    """The names of the inputs in the order in which they are given; those that are no tensors too."""
    return [s.arg.name for s in graph.capture.exported.graph_signature.input_specs if s.target is None]


def _uses(node: Node) -> Iterator[Node]:
    """What is done with the ids of an input, wherever they are moved to; looking at their shape is no use."""
    tensor = node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.dtype == torch.bool or tensor.is_floating_point():
        return
    queue, seen = [node], set()
    while queue:
        ids = queue.pop()
        for user in ids.users:
            if user in seen:
                continue
            seen.add(user)
            name = without_overload(user.target)
            moves = name in MOVES and user.all_input_nodes[0] is ids
            if user.target is operator.getitem or moves:
                queue.append(user)
            elif name not in LOOKS_AT_SHAPES:
                yield user


def _table(use: Node, values: Mapping[str, Value]) -> Value | None:
    """The parameter that an operator looks rows up in."""
    names = _LOOKUPS.get(without_overload(use.target))
    if names is None:
        return None
    source = by_name(use)[names[0]]
    value = values.get(source.name) if isinstance(source, Node) else None
    by_rows = by_name(use).get("dim", 0) == 0
    return value if value is not None and value.kind == "parameter" and by_rows else None


def _removal(graph: DependencyGraph, dim: int, kept: np.ndarray) -> dict[str, np.ndarray]:
    """The groups of the tokens that go; raises PlanError where the rows are fixed for other reasons."""
    number = graph.widths.class_of(dim)
    names = graph.widths.reaching.get(number, [])
    if len(names) != 1:
        why = graph.classes.fixed_whole.get(number)
        raise PlanError(f"the vocabulary can't be trimmed: {why or 'its rows are no axis of their own'}")
    labels = graph[names[0]].labels[number]
    return {names[0]: np.unique(labels[np.setdiff1d(np.arange(len(labels)), kept)])}


def _holds(ids: Any, kept: np.ndarray) -> bool:
    """Are all ids kept ones? Those without values are taken to be."""
    return bool(ids.is_meta or np.isin(ids.cpu().numpy(), kept).all())


def _only_kept(leaves: list[Any], places: tuple[int, ...], kept: np.ndarray) -> list[Any]:
    """Example inputs in which kept ids stand in the place of others."""
    found = list(leaves)
    for at in places:
        if not _holds(leaves[at], kept):
            ids = leaves[at].cpu().numpy()
            other = np.where(np.isin(ids, kept), ids, kept[ids % len(kept)])
            found[at] = torch.from_numpy(other).to(leaves[at])
    return found


def _config(plan: Plan, size: int, count: int) -> dict[str, int]:
    """The integer of a transformers config that makes it build the trimmed model; none where there is no single one."""
    graph = plan.graph
    if not of_library(graph.model) or count == size:
        return {}
    kept, configs = plan.kept(), Configs(graph.model)
    values = graph.capture.program.values.values()
    wanted = {v.target: kept.shape(v) for v in values if v.kind in ("parameter", "buffer") and v.target}
    fitting = []
    for where, value in configs.integers.items():
        shapes = configs.shapes({where: count}) if value == size else None
        if shapes is not None and all(wanted.get(name, shape) == shape for name, shape in shapes.items()):
            fitting.append(".".join(where))
    return {fitting[0]: count} if len(fitting) == 1 else {}
