"""What a forward that decides by values asked for: dims whose indices the code goes by, and indices that it chose among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from depgraph.capture.deciding import Asked
from depgraph.capture.exported import CapturedProgram, decisions_of
from depgraph.graph import Least, Program, Reason, Relations, Value

ASKED = "the code of the model goes by its indices"
_CHOOSE = frozenset(["topk", "max", "min", "argmax", "argmin"])


class Choice(NamedTuple):
    """What was asked, and the dim that the answer's numbers point into: of the size of the one chosen among."""

    asked: Asked
    domain: int


Chosen = dict[str, Choice]
"""By name, the constants of a graph that hold indices chosen among those of a dim."""


def all_asked(exported: CapturedProgram) -> Sequence[Asked]:
    """What a forward asked for, in order; nothing where it doesn't decide by values."""
    decisions = decisions_of(exported)
    return () if decisions is None else decisions.asked


def chosen(exported: CapturedProgram, relations: Relations) -> Chosen:
    """The constants that hold what was chosen, before the dims that it was chosen among are lowered."""
    asked = [a for a in all_asked(exported) if a.gives and a.dim is not None and a.operator.split(".")[1] in _CHOOSE]
    nodes = {node.name: node for node in exported.graph.nodes} if asked else {}
    sizes = [int(nodes[a.node].meta["val"].shape[a.dim]) for a in asked]
    return {a.gives: Choice(a, relations.new_dim(size)) for a, size in zip(asked, sizes, strict=True)}


def relate(exported: CapturedProgram, program: Program, known: Chosen) -> None:
    """Fix the dims whose indices, or numbers in their order, the code got hold of; what it chose points into them."""
    for name, choice in known.items():
        source, picks = program.values.get(choice.asked.node), program.values.get(name)
        if source is not None and picks is not None:
            _among(program.relations, choice, source, picks)
    for asked in all_asked(exported):
        value = program.values.get(asked.node)
        for d in () if value is None else (range(len(value.shape)) if asked.dim is None else [asked.dim]):
            text = f"{asked.operator} at {asked.where or 'an unknown place'} asks for its indices"
            program.relations.fix(value.dim(d), Reason(text, why=ASKED))  # type: ignore[union-attr]


def _among(relations: Relations, choice: Choice, source: Value, picks: Value) -> None:
    asked, along = choice.asked, choice.asked.dim or 0
    dim, name = source.dim(along), asked.operator.split(".")[1]
    relations.align(choice.domain, dim)
    count = picks.shape[along] if name == "topk" else 1
    text = f"{count} of its indices are chosen ({asked.operator}, {asked.where or 'an unknown place'})"
    relations.mix(dim, f"{name} chooses among its indices")
    relations.least.append(Least(dim, count, Reason(text)))
