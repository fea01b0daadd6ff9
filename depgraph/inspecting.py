"""All that `inspect` says of a model: axes alike folded into families, what they save, and what is fixed and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from depgraph.axes import Axis
from depgraph.describing import Description, describe
from depgraph.layers import Anatomy
from depgraph.report import ONLY_TOGETHER, freed, ranges, uncovered, why_fixed
from depgraph.widths import Cost

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_BY_DATA = "decided by the data: which indices are used is known at run time only"
_BY_PLACE = "places count: the operator depends on where an index stands"
HEADINGS = {
    "the model's inputs have this size": "inputs: what the model is fed has this size",
    "the model's outputs have this size": "outputs: who calls the model counts on their size",
    "windows slide along it": "kernels and windows: their size is what the operator does",
    "the model gives back its indices as numbers": "outputs: the model gives back numbers of its indices",
    "its rows are looked up by number": "tables looked up by number: positions, or a vocabulary, which graph.vocabulary.keep trims",
    "an index tensor points into it": "picked by index: numbers in a tensor point into it",
    "what is done with its indices counts them": "chosen by number: the code does more with the numbers than look up",
    "the rule of an operator fixes it": "marked: the rule of an operator says that it can't be narrowed",
    "single indices of it are picked": "picked by index: the code takes single positions of it",
    "it meets sizes that neither the file nor a run tells": "behind operators that nobody knows: sizes that nothing tells",
    "no rule knows what this operator does with it": "operators without a rule: what they do isn't known",
    "its indices are what the operator returns": _BY_DATA,
    "what comes out depends on the data": _BY_DATA,
    "a mask picks from it": _BY_DATA,
    "values are written at positions known at run time only": _BY_DATA,
    "how often an index is repeated is known at run time only": _BY_DATA,
    "the order of its indices matters": _BY_PLACE,
    "neighbouring indices are subtracted": _BY_PLACE,
    "its values are counted from the dimension's size": _BY_PLACE,
    "it is padded from within": _BY_PLACE,
    ONLY_TOGETHER: "all or nothing: its indices can only go all at once",
}


@dataclass(frozen=True)
class Saving:
    """What the model is without when one group of an axis has gone, and when all have that may go."""

    one: Cost
    all: Cost


@dataclass(frozen=True)
class Family:
    """Axes that are alike but for numbers in their names: repeated layers."""

    what: str
    names: str
    axes: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return self.axes[0].size

    @property
    def free(self) -> int:
        """How many groups of each axis may go."""
        return int(self.axes[0].prunable.sum())

    @property
    def note(self) -> str:
        """Exact, what mixes it, or why none of it can go."""
        first = self.axes[0]
        if not self.free:
            return first.why_fixed
        return "exact" if first.exact else f"mixed: {', '.join(first.mixed_by)}"


@dataclass(frozen=True)
class Fixed:
    """Dims of parameters that stay as they are for one reason; names are folded, `count` is of dims."""

    heading: str
    dims: tuple[str, ...]
    count: int


class Inspection:
    """A graph in words; computed when asked for."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self.anatomy = Anatomy(graph)

    @cached_property
    def descriptions(self) -> dict[str, Description]:
        return describe(self.anatomy)

    @cached_property
    def savings(self) -> dict[str, Saving]:
        return {axis.name: Saving(self._one(axis), freed(self.graph, axis)) for axis in self.graph.axes}

    @cached_property
    def families(self) -> list[Family]:
        """In the order of the graph, those that may be narrowed first."""
        found: dict[tuple[object, ...], list[Axis]] = {}
        for axis in self.graph.axes:
            said = self.descriptions[axis.name]
            words = (starred(t) for t in (said.role, said.where, said.note, axis.name.partition(":")[0]))
            rest = (axis.name.partition(":")[2], axis.size, int(axis.prunable.sum()), axis.mixed_by)
            found.setdefault((*words, *rest, re.sub(r"\d+", "*", axis.why_fixed)), []).append(axis)
        families = [self._family(axes) for axes in found.values()]
        return sorted(families, key=lambda family: not family.free)

    @cached_property
    def fixed(self) -> list[Fixed]:
        """What no axis reaches, by reason."""
        found: dict[str, dict[str, set[int]]] = {}
        for left in uncovered(self.graph):
            found.setdefault(_heading(left.why, left.lift), {}).setdefault(left.target, set()).add(left.dim)
        return [_fixed(heading, dims) for heading, dims in found.items()]

    def why(self, dim: int) -> str:
        """Why no axis reaches a dim, in plain words."""
        reason = why_fixed(self.graph.classes, self.anatomy.class_of(dim), np.arange(self.anatomy.size(dim)))
        return _heading(reason.why or reason.text, reason.free)

    def _family(self, axes: list[Axis]) -> Family:
        said = [str(self.descriptions[axis.name]) for axis in axes]
        return Family(merged(said), merged(axis.name for axis in axes), tuple(axes))

    def _one(self, axis: Axis) -> Cost:
        dense, going = self.graph.dense_cost, np.flatnonzero(axis.prunable)[: max(axis.size - 1, 0)]
        left = self.graph.cost({axis.name: going[:1]}) if len(going) else dense
        return Cost(dense.params - left.params, dense.macs - left.macs, dense.bytes - left.bytes)


def _heading(why: str, lift: str) -> str:
    return f"{HEADINGS.get(why, why)}{f' (lift with free=[{lift!r}])' if lift else ''}"


def share_range(dense: Cost, costs: Iterable[Cost]) -> str:
    """Shares of parameters and MACs, `4.5% / 5.1%`; a range, `2.0-4.5% / 5.1%`, where the costs differ."""
    shares = [cost.share_of(dense) for cost in costs]
    return " / ".join(_percent([share[metric] for share in shares]) for metric in ("params", "macs"))


def _percent(shares: list[float]) -> str:
    digits = 1 if max(shares) >= 0.001 else 2
    low, high = (f"{100 * end:.{digits}f}" for end in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low}-{high}%"


def starred(text: str) -> str:
    """A dotted name with the numbers of its modules starred, but not within its last part, which isn't of a repeated module."""
    parts = text.split(".")
    last = parts.pop()
    return ".".join([*(re.sub(r"\d+", "*", part) for part in parts), "*" if last.isdecimal() else last])


def merged(texts: Iterable[str]) -> str:
    """Texts that differ in numbers only as one: `{0-3}` stands where they differ."""
    split = [re.split(r"(\d+)", text) for text in texts]
    if len({tuple(parts[::2]) for parts in split}) > 1:
        return ", ".join(dict.fromkeys("".join(parts) for parts in split))
    return "".join(_either(parts) for parts in zip(*split, strict=True))


def _either(parts: tuple[str, ...]) -> str:
    if len(set(parts)) == 1:
        return parts[0]
    return f"{{{ranges(map(int, parts))}}}"


def _fixed(heading: str, dims: dict[str, set[int]]) -> Fixed:
    alike: dict[str, list[str]] = {}
    for target, places in dims.items():
        owner, _, last = target.rpartition(".")
        alike.setdefault(f"{starred(owner)}.{last}{places}", []).append(f"{target}[{ranges(places)}]")
    names = tuple(f"{merged(n)}{f' x{len(n)}' if len(n) > 1 else ''}" for n in alike.values())
    return Fixed(heading, names, sum(map(len, dims.values())))
