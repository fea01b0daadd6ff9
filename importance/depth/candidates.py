"""Which blocks or branches of a graph a method ranks, in order of execution."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from depgraph import DependencyGraph
from depgraph.blocks import Block
from depgraph.errors import ScoreError
from depgraph.residual import Branch
from importance.choices import pick

OF = {"blocks": "blocks", "branches": "branches"}


def parts_of(graph: DependencyGraph, of: str) -> tuple[Block, ...] | tuple[Branch, ...]:
    """The `of` ("blocks" or "branches") of a graph; raises ScoreError, with a reason, where it has none."""
    pick(OF, of, "kind of part")
    found: tuple[Block, ...] | tuple[Branch, ...] = graph.blocks if of == "blocks" else graph.branches
    if not found:
        raise ScoreError(f"{graph.name} has no {of} that could be left out: {_why_none(graph)}")
    return found


def _why_none(graph: DependencyGraph) -> str:
    for name, why in graph.branches_refused.items():
        return f"{name} can't go, {why}"
    if graph.branches:
        return (
            "no entry of a list of modules takes a stream and adds to it by itself; "
            f"it has branches, such as {graph.branches[0].name!r}"
        )
    return "no addition joins a stream with what was computed from it"


def named_parts(graph: DependencyGraph) -> dict[str, Block | Branch]:
    """All blocks and branches by name."""
    return {**{block.name: block for block in graph.blocks}, **{branch.name: branch for branch in graph.branches}}


def ends_of(part: Block | Branch) -> tuple[str, str]:
    """The names of the nodes that make a part's input and output."""
    return (part.input, part.output) if isinstance(part, Block) else (part.source, part.add)


def names_of(graph: DependencyGraph, of: str) -> tuple[str, ...]:
    """Their names; raises ScoreError as `parts_of` does."""
    return tuple(part.name for part in parts_of(graph, of))


def between_ends(names: Sequence[str], first: int, last: int) -> tuple[str, ...]:
    """The names without the first and last few, which are protected; raises ScoreError where that leaves none."""
    if first < 0 or last < 0:
        raise ScoreError(f"a negative number of parts can't be protected: first={first}, last={last}")
    found = tuple(names[first : len(names) - last])
    if not found:
        raise ScoreError(
            f"all {len(names)} parts are protected by first={first} and last={last}, so that none can go: protect fewer"
        )
    return found


def require_count(count: int, candidates: int, what: str) -> None:
    """Raise ScoreError unless `count` of that many candidates can go."""
    if not isinstance(count, Integral):
        raise ScoreError(f"{count!r} {what} can't go: give a whole number")
    if not 0 <= count <= candidates:
        raise ScoreError(f"{count} {what} can't go: there are {candidates} that may, ask for 0 to {candidates}")
