"""The repeated blocks of a model, the axes that lie within each, and numbers that are given for blocks or axes."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real

from depgraph import Axis, DependencyGraph
from depgraph.errors import ScoreError
from depgraph.joins import name_of
from depgraph.paths import is_in

Given = Mapping[str, float] | Callable[[DependencyGraph], Mapping[str, float]]
"""One number for every block or axis, by its name, or a function of the graph that finds them."""

_HELD = ("parameter", "buffer", "constant")


def axis_blocks(graph: DependencyGraph) -> dict[str, str]:
    """The block that every axis lies in: its module path, such as "layers.3"; axes that reach beyond a block are left out.

    Blocks are modules that stand several times, numbered, in one container, and add what they compute to something else that
    was computed (a residual connection); without such an addition, the outermost module that is repeated so.
    """
    adding = set(_additions(graph))
    alike, found = _repeated(graph), {}
    for axis in graph.axes:
        repeated = [path for path in _above(_common(graph, axis)) if path in alike]
        if repeated:
            fit = (path for path in reversed(repeated) if any(is_in(place, path) for place in adding))
            found[axis.name] = next(fit, repeated[0])
    return found


def blocks(graph: DependencyGraph) -> list[str]:
    """The blocks that hold an axis, by module path, in the order of execution."""
    return list(dict.fromkeys(axis_blocks(graph).values()))


def first_and_last(graph: DependencyGraph, first: int = 1, last: int = 1) -> tuple[str, ...]:
    """The axes of the `first` first and the `last` last blocks, for `graph.plan(..., protect=...)`.

    LLM-Pruner leaves the first 4 and the last 2 of 32 blocks alone (METHODS.md 2.1), others the first and last. All blocks of
    a model count as one row: the last of an encoder and a decoder is the decoder's.

    Raises ScoreError where a number is negative, or that leaves no block to prune.
    """
    within = axis_blocks(graph)
    row = list(dict.fromkeys(within.values()))
    if first < 0 or last < 0:
        raise ScoreError(f"the first {first} and last {last} blocks can't be protected: give numbers of 0 or more")
    if first + last >= max(len(row), 1):
        raise ScoreError(
            f"protecting the first {first} and last {last} of {len(row)} blocks leaves none to prune: protect fewer"
        )
    kept = {*row[:first], *row[len(row) - last :]}
    return tuple(name for name, block in within.items() if block in kept)


@dataclass(frozen=True)
class PerBlock:
    """Numbers by the name they were given for (`values`), and that name for each axis that has one (`of_axis`)."""

    values: dict[str, float]
    of_axis: dict[str, str]

    @classmethod
    def of(cls, graph: DependencyGraph, given: Given, what: str) -> PerBlock:
        """What was given, for the axes that may lose a group; an axis's own number goes before its block's.

        Raises ScoreError: a value is no finite number, a name is no axis's and no block's, or an axis that may lose a group
        lies in a block without a number.
        """
        numbers = _numbers(given(graph) if callable(given) else given, what)
        within = axis_blocks(graph)
        unknown = [name for name in numbers if name not in {*within.values(), *(axis.name for axis in graph.axes)}]
        if unknown:
            raise ScoreError(
                f"{what} name {unknown[0]!r}, which is no axis and no block: {_nearest(unknown[0], within)}"
            )
        of_axis = {}
        for axis in graph.axes:
            name = axis.name if axis.name in numbers else within.get(axis.name)
            if name is not None and axis.prunable.any():
                of_axis[axis.name] = name
                if name not in numbers:
                    raise ScoreError(
                        f"{what} have no number for block {name!r}, where axis {axis.name!r} lies: give one"
                    )
        if not of_axis:
            raise ScoreError(f"{what} have no number for any axis that may lose a group: give some by axis name")
        return cls({name: numbers[name] for name in dict.fromkeys(of_axis.values())}, of_axis)

    def get(self, axis: Axis, otherwise: float, made: Mapping[str, float]) -> float:
        """What was `made` of the number of an axis, or `otherwise` where it has none, as it reaches beyond a block."""
        return made[self.of_axis[axis.name]] if axis.name in self.of_axis else otherwise


def _numbers(given: Mapping[str, float], what: str) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ScoreError(f"{what} are a {type(given).__name__}: give a mapping from block or axis to a number")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ScoreError(f"of {what}, that of {name!r} is {value!r}: give a finite number")
    return {name: float(value) for name, value in given.items()}


def _nearest(name: str, within: Mapping[str, str]) -> str:
    names = [*dict.fromkeys(within.values()), *within]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0) or ["none"]
    return f"did you mean {near[0]!r}?"


def _common(graph: DependencyGraph, axis: Axis) -> list[str]:
    """The path, by parts, of the innermost module that holds all parameters of an axis."""
    paths = [graph.owner_of(m.target).split(".") for m in axis.members if m.kind == "parameter"]
    least, most = min(paths, default=[]), max(paths, default=[])
    same = next((k for k, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    return least[:same]


def _above(parts: list[str]) -> list[str]:
    """The paths that end in a number on the way to a module, the outermost first."""
    return [".".join(parts[: k + 1]) for k, part in enumerate(parts) if part.isdigit()]


def _repeated(graph: DependencyGraph) -> set[str]:
    """The modules, by path, that have a numbered sibling of their class in one container."""
    numbered = [
        (path, path.rpartition(".")[0], graph.likeness(path)[0])
        for path in graph.entries
        if path.rpartition(".")[2].isdigit()
    ]
    count = Counter((holder, kind) for _, holder, kind in numbered)
    return {path for path, holder, kind in numbered if count[holder, kind] > 1}


def _additions(graph: DependencyGraph) -> Iterator[str]:
    """The modules in which two computed values are added."""
    values = graph.capture.program.values
    for node in graph.nodes:
        if name_of(node) != "add":
            continue
        read = [values[n.name].kind for n in node.all_input_nodes if n.name in values]
        if node.name in values and len(read) > 1 and not any(kind in _HELD for kind in read):
            yield values[node.name].module
