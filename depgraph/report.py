"""Axes and plans as plain text: one block an axis, stable enough to compare and short enough to read.

Names that differ in their numbers only are folded into one, `layers.{0-3}.fc.weight`, where all else is the same.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from depgraph.axes import Axis
from depgraph.classes import NONE, Classes
from depgraph.graph import Reason
from depgraph.widths import Cost, stored_values
from depgraph.wording import counted

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan

METRICS = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
_NUMBER = re.compile(r"((?:^|(?<=\.))\d+(?=\.))")
ONLY_TOGETHER = "its indices can only go all at once"
UNREAD = "the traced forward doesn't read it"


@dataclass(frozen=True)
class Line:
    """One line of a widths table: axes alike but for their numbers, their groups before and after a plan."""

    names: str
    axes: int
    before: int
    after: tuple[int, ...]

    @property
    def left(self) -> str:
        """Groups left: a number, or a range where the axes differ."""
        return span(self.after)

    @property
    def share(self) -> float:
        return sum(self.after) / (self.before * self.axes)


def axes_text(graph: DependencyGraph) -> str:
    """All axes with their members and costs, what is fixed and why, and what no axis reaches."""
    dense = graph.dense_cost
    costs = ", ".join(f"{getattr(dense, metric):,} {word}" for metric, word in METRICS.items())
    head = f"{graph.name}: {counted(len(graph.axes), 'axis', 'axes')}; {costs}"
    blocks = [head, *(axis_text(graph, axis) for axis in graph.axes), *_rest(graph)]
    return "\n\n".join(blocks)


def plan_text(plan: Plan) -> str:
    """What a plan costs and the widths it leaves, axis by axis."""
    touched, total = len(plan.removal), len(plan.graph.axes)
    head = f"plan for {plan.graph.name}: {touched} of {counted(total, 'axis', 'axes')} lose groups"
    lines = [head, *cost_lines(plan.graph.dense_cost, plan.cost())]
    rows = [(line.names, f"{line.before} -> {line.left}", f"{line.share:.1%}") for line in widths(plan)]
    left_out = [f"left out: {', '.join(folded(plan.branches))}"] if plan.branches else []
    return "\n".join([*lines, *left_out, *aligned(rows), *plan.notes])


def axis_text(graph: DependencyGraph, axis: Axis) -> str:
    """The block of one axis."""
    lines = [f"axis {axis.name}", f"  groups   {_groups(graph, axis)}"]
    lines.append("  check    exact" if axis.exact else f"  check    mixed by {', '.join(axis.mixed_by)}")
    lines.append(f"  saves    {_savings(graph, axis)}")
    lines.append("  members")
    lines += [f"    {row}" for row in _members(graph, axis)]
    if axis.reasons:
        lines.append("  fixed")
        lines += [f"    {row}" for row in _fixed(axis.reasons, axis.size)]
    return "\n".join(lines)


def freed(graph: DependencyGraph, axis: Axis) -> Cost:
    """What the model is without when all groups of an axis have gone that may go; as many stay as must, one at least."""
    going = np.flatnonzero(axis.prunable)
    most = axis.size - graph.widths.least(axis.name)
    left = graph.cost({axis.name: going[max(len(going) - most, 0) :]})
    dense = graph.dense_cost
    return Cost(dense.params - left.params, dense.macs - left.macs, dense.bytes - left.bytes)


def widths(plan: Plan) -> list[Line]:
    """The axes a plan narrows, those alike in all but their numbers in one line, in the order of the graph."""
    after = {name: plan.graph[name].size - len(groups) for name, groups in plan.removal.items()}
    narrowed = [axis for axis in plan.graph.axes if axis.name in after]
    found: dict[tuple[str, int], list[Axis]] = {}
    for axis in narrowed:
        found.setdefault((axis.kind, axis.size), []).append(axis)
    return [
        Line(", ".join(folded(a.name for a in alike)), len(alike), size, tuple(after[a.name] for a in alike))
        for (_, size), alike in found.items()
    ]


def cost_lines(before: Cost, after: Cost) -> list[str]:
    """Parameters, MACs and bytes before and after, one line each."""
    shares = after.share_of(before)
    rows = [
        (word, f"{getattr(before, metric):,} -> {getattr(after, metric):,}", f"{shares[metric]:.1%}")
        for metric, word in METRICS.items()
    ]
    return aligned(rows)


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers only as one: `a.0.b` and `a.1.b` are `a.{0-1}.b`."""
    return [name for name, _ in fold((name, None) for name in names)]


def fold(named: Iterable[tuple[str, Hashable]]) -> list[tuple[str, Hashable]]:
    """Pairs of a name and what is said of it; where the same is said of names alike but for numbers, one pair."""
    rows: dict[tuple[tuple[str | frozenset[int], ...], Hashable], None] = {}
    for name, said in named:
        parts = tuple(frozenset({int(p)}) if p.isdecimal() else p for p in _NUMBER.split(name))
        rows[parts, said] = None
    for position in range(max((len(parts) for parts, _ in rows), default=0)):
        rows = _merged(rows, position)
    return [("".join(_part(p) for p in parts), said) for parts, said in rows]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with their columns one under another."""
    wide = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip() for row in rows]


Rows = dict[tuple[tuple[str | frozenset[int], ...], Hashable], None]


def _merged(rows: Rows, position: int) -> Rows:
    """Rows that differ in the numbers at one position only, as one row."""
    numbers: dict[Hashable, frozenset[int]] = {}
    firsts: dict[Hashable, tuple[tuple[str | frozenset[int], ...], Hashable]] = {}
    for parts, said in rows:
        here = parts[position] if position < len(parts) else ""
        key: Hashable = (parts, said)
        if isinstance(here, frozenset):
            key = (parts[:position], parts[position + 1 :], said)
            numbers[key] = numbers.get(key, frozenset()) | here
        firsts.setdefault(key, (parts, said))
    merged: Rows = {}
    for key, (parts, said) in firsts.items():
        new = (*parts[:position], numbers[key], *parts[position + 1 :]) if key in numbers else parts
        merged[new, said] = None
    return merged


def _part(part: str | frozenset[int]) -> str:
    if isinstance(part, str):
        return part
    return ranges(part) if len(part) == 1 else f"{{{ranges(part)}}}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3 and 7."""
    given = set(numbers)
    starts = sorted(n for n in given if n - 1 not in given)
    ends = sorted(n for n in given if n + 1 not in given)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _groups(graph: DependencyGraph, axis: Axis) -> str:
    free, least = int(axis.prunable.sum()), graph.widths.least(axis.name)
    most = f"all may go but {'one' if least == 1 else least}"
    may = most if free == axis.size else f"{min(free, axis.size - least) or 'none'} may go"
    return f"{axis.size}, {may}"


def _savings(graph: DependencyGraph, axis: Axis) -> str:
    gone = freed(graph, axis)
    shares = gone.share_of(graph.dense_cost)
    parts = [f"{getattr(gone, m):,} {METRICS[m]} ({shares[m]:.1%})" for m in ("params", "macs")]
    return f"at most {' and '.join(parts)}"


def _members(graph: DependencyGraph, axis: Axis) -> list[str]:
    ties = graph.capture.program.ties
    rows: list[tuple[str, Hashable]] = []
    for member in axis.members:
        reached = member.labels[member.labels != NONE]
        each = span(np.bincount(reached)[np.unique(reached)])
        part = f" ({len(reached)} of them reached)" if len(reached) < len(member.labels) else ""
        first = ties.get(member.target, member.target)
        note = f"tied to {first}" if first != member.target else ""
        said = f"{each} of {len(member.labels)} a group{part}", note or member.kind.replace("parameter", "")
        rows.append((f"{member.target}[{member.dim}]", said))
    return aligned([(name, *said) for name, said in fold(rows)])  # type: ignore[misc]


def span(numbers: Iterable[int]) -> str:
    """`3` where all numbers are 3, else the least and the largest: `2-5`."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


def _fixed(reasons: dict[int, Reason], size: int) -> list[str]:
    by_reason: dict[Reason, list[int]] = {}
    for group, reason in reasons.items():
        by_reason.setdefault(reason, []).append(group)
    return [
        f"{'all groups' if len(groups) == size else f'groups {ranges(groups)}'}: {_worded(reason)}"
        for reason, groups in by_reason.items()
    ]


def _worded(reason: Reason) -> str:
    return f"{reason.text}; lift with free=[{reason.free!r}]" if reason.free else reason.text


def _rest(graph: DependencyGraph) -> list[str]:
    """What no axis says: operators without a rule, and dims of parameters that stay as they are."""
    blocks = []
    unknown = [
        (f"  {operator}", f"{len(places)} x", ", ".join(dict.fromkeys(places)))
        for operator, places in graph.unknown.items()
    ]
    if unknown:
        blocks.append("\n".join(["operators without a rule", *aligned(unknown)]))
    by_reason: dict[str, list[tuple[str, Hashable]]] = {}
    for left in uncovered(graph):
        said = f"{left.indices} of {left.size}" if left.indices < left.size else f"all {left.size}"
        by_reason.setdefault(left.reason, []).append((f"{left.target}[{left.dim}]", said))
    if by_reason:
        lines = ["indices of parameters that no axis covers"]
        for reason, rows in by_reason.items():
            lines += [f"  {reason}", *(f"    {row}" for row in aligned(fold(rows)))]  # type: ignore[arg-type]
        blocks.append("\n".join(lines))
    return blocks


@dataclass(frozen=True)
class Uncovered:
    """`indices` of the `size` indices of one dim of a parameter belong to no axis, and why."""

    target: str
    dim: int
    size: int
    indices: int
    reason: str
    why: str
    lift: str = ""


def uncovered(graph: DependencyGraph) -> list[Uncovered]:
    """What no axis reaches of the dims of parameters that are wider than one."""
    found, unread = [], {value.name for value in graph.capture.program.unread()}
    parameters = (value for value in stored_values(graph.capture.program) if value.kind == "parameter")
    for value, d, dim in ((v, d, dim) for v in parameters for d, dim in enumerate(v.dims) if v.shape[d] > 1):
        number, left = graph.widths.class_of(dim), np.ones(value.shape[d], dtype=bool)
        for name in graph.widths.axes_of(dim):
            left &= graph[name].labels[number] == NONE
        if left.any():
            why = why_fixed(graph.classes, number, np.flatnonzero(left))
            because = Reason(UNREAD) if value.name in unread else why
            said = _worded(because), because.why or because.text, because.free
            found.append(Uncovered(value.target, d, value.shape[d], int(left.sum()), *said))
    return found


def why_fixed(classes: Classes, number: int, indices: np.ndarray) -> Reason:
    """The reason that fixes indices of a class of dims: their own, or that of what they are aligned with, the nearest."""
    queue, seen = [(number, indices)], {number}
    for here, those in queue:
        some = classes.fixed.get(here, {})
        reason = classes.fixed_whole.get(here) or next((some[i] for i in map(int, those) if i in some), None)
        if reason is not None:
            return reason
        for other, there in _beside(classes, here, those):
            if other not in seen and len(there):
                seen.add(other)
                queue.append((other, there))
    return Reason(ONLY_TOGETHER)


def _beside(classes: Classes, number: int, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Classes of dims that relations lead to from the given indices, and the indices there."""
    for here, other, there in classes.pushes.get(number, ()):
        yield other, there[np.isin(here, indices)]
    for k in classes.folds_of.get(number, ()):
        fold_ = classes.folds[k]
        shape = tuple(classes.size[part] for part in fold_.parts)
        places = np.unravel_index(np.arange(classes.size[fold_.flat]), shape)
        if number == fold_.flat:
            yield from ((part, np.unique(at[indices])) for part, at in zip(fold_.parts, places, strict=True))
        for part, at in zip(fold_.parts, places, strict=True):
            if part == number:
                yield fold_.flat, np.flatnonzero(np.isin(at, indices))
