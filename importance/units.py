"""Which axes a method prunes: the units of the papers (heads, neurons, channels within a block), or everything.

What an axis is comes from the graph's structure (`depgraph.describing`), so that the same words hold for every architecture.
"""

from __future__ import annotations

from depgraph import DependencyGraph
from depgraph.describing import describe
from depgraph.errors import NothingToPrune
from depgraph.layers import Anatomy
from importance.choices import pick

_LOOK = ": depgraph inspect, or graph.show(), says what holds each"
_STREAM = ("residual stream",)
_WITHIN = ("head width", "rotary pairs", "query heads", "dimension ", "inputs")
_OF_EVERY = ("experts of every group", "entries of every group", "of every expert")
_EXPERTS = ("experts", "groups of experts", "entries", "groups of entries")

KINDS = {
    "units": "heads, neurons and channels within a block: what LLM-Pruner's block-wise pruning, Wanda-sp and FLAP let go",
    "neurons": "the same without heads",
    "heads": "attention heads, or KV heads with their query heads",
    "stream": "the widths of residual streams",
    "experts": "experts of mixtures",
    "all": "every axis",
}


def units(graph: DependencyGraph, which: str = "units") -> list[str]:
    """The names of a graph's axes of a kind of `KINDS` that may lose a group.

    Raises NothingToPrune when there is none, ScoreError for an unknown kind.
    """
    pick(KINDS, which, "kind of units")
    roles = describe(Anatomy(graph))
    found = [axis.name for axis in graph.axes if axis.prunable.any() and which in _kinds(roles[axis.name].role)]
    if not found and which == "all":
        raise NothingToPrune(f"{graph.name} has no axis that may lose a group{_LOOK}")
    if not found:
        free = [_kinds(roles[axis.name].role) for axis in graph.axes if axis.prunable.any()]
        there = " and ".join(repr(kind) for kind in KINDS if any(kind in kinds for kinds in free))
        raise NothingToPrune(
            f"{graph.name} has no axis of the kind {which!r} ({KINDS[which]}) that may lose a group"
            + (f": take a recipe or units of another kind, it has {there}" if there else _LOOK)
        )
    return found


def _kinds(role: str) -> set[str]:
    """The kinds that an axis with this role is of."""
    if role.startswith(_STREAM):
        return {"stream", "all"}
    if role.startswith(_WITHIN) or role.endswith(_OF_EVERY):
        return {"all"}
    if role.startswith(_EXPERTS):
        return {"experts", "all"}
    if role in ("attention heads", "KV heads"):
        return {"heads", "units", "all"}
    return {"neurons", "units", "all"}
