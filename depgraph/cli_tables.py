"""Axes and plans as tables to read, and as plain data for `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from depgraph.axes import Axis
from depgraph.dependency import DependencyGraph
from depgraph.plan import Plan
from depgraph.report import METRICS, counted, fold, freed, ranges, uncovered, widths
from depgraph.widths import Cost


def cost_table(before: Cost, after: Cost) -> Table:
    """Parameters, MACs and bytes before and after."""
    table = _table("", "before", "after", "kept")
    shares = after.share_of(before)
    for metric, word in METRICS.items():
        old, new = getattr(before, metric), getattr(after, metric)
        table.add_row(word, f"{old:,}", f"{new:,}", f"{shares[metric]:.1%}")
    return table


def widths_table(plan: Plan) -> Table:
    """Groups before and after, by kind of axis."""
    table = _table("axis", "groups", "left", "kept")
    for line in widths(plan):
        table.add_row(line.names, str(line.before), line.left, f"{line.share:.1%}")
    return table


def print_axes(graph: DependencyGraph, out: Console) -> None:
    """What `inspect` says: costs, a line for each kind of axis, and what is left out."""
    cost = graph.dense_cost
    found = f"{type(graph.model).__name__}: {counted(len(graph.axes), 'axis', 'axes')}"
    costs = f"{cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes"
    out.print(f"{found}, {costs}\n", highlight=False)
    if graph.axes:
        out.print(axes_table(graph))
    for line in rest_lines(graph):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def axes_table(graph: DependencyGraph) -> Table:
    """One line for axes that are alike in all but their numbers."""
    table = _table("axis", "groups", "may go", "saves up to", "check or reason")
    for name, said in fold((axis.name, _axis_cells(graph, axis)) for axis in graph.axes):
        table.add_row(name, *said)  # type: ignore[misc]
    return table


def _axis_cells(graph: DependencyGraph, axis: Axis) -> tuple[str, ...]:
    share = freed(graph, axis).share_of(graph.dense_cost)["params"]
    note = "exact" if axis.exact else ", ".join(axis.mixed_by)
    free = int(axis.prunable.sum())
    return str(axis.size), str(free), f"{share:.1%}", note if free else axis.why_fixed


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "check or reason" else "right", overflow="fold")
    return table


def rest_lines(graph: DependencyGraph) -> list[str]:
    """What `inspect` says below its table: operators without a rule, and how many dims stay as they are."""
    lines = []
    for operator, places in graph.unknown.items():
        where = ", ".join(dict.fromkeys(places))
        lines.append(f"no rule for {operator} ({len(places)} x, {where}): its dims are left alone")
    left = uncovered(graph)
    if left:
        dims = counted(len(left), "dim", "dims")
        lines.append(f"{dims} of parameters can't be narrowed, or not all over (--long says which and why)")
    return lines


def graph_json(graph: DependencyGraph) -> dict[str, Any]:
    """All that `inspect` knows, as plain data."""
    left = uncovered(graph)
    return {
        "model": type(graph.model).__name__,
        "cost": asdict(graph.dense_cost),
        "axes": [_axis_json(graph, axis) for axis in graph.axes],
        "unknown_operators": graph.unknown,
        "fixed_dims": [asdict(dim) for dim in left],
        "note": graph.note,
    }


def _axis_json(graph: DependencyGraph, axis: Axis) -> dict[str, Any]:
    by_reason: dict[str, list[int]] = {}
    for group, reason in axis.reasons.items():
        by_reason.setdefault(str(reason), []).append(group)
    return {
        "name": axis.name,
        "groups": axis.size,
        "prunable": int(axis.prunable.sum()),
        "exact": axis.exact,
        "mixed_by": list(axis.mixed_by),
        "saves": asdict(freed(graph, axis)),
        "members": [{"name": m.target, "dim": m.dim, "kind": m.kind, "size": len(m.labels)} for m in axis.members],
        "fixed": {reason: ranges(groups) for reason, groups in by_reason.items()},
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """Costs and widths that a plan leaves, as plain data."""
    before, after = plan.graph.dense_cost, plan.cost()
    axes = [
        {"name": axis.name, "groups": axis.size, "left": axis.size - len(plan.removal.get(axis.name, ()))}
        for axis in plan.graph.axes
    ]
    return {
        "model": type(plan.graph.model).__name__,
        "before": asdict(before),
        "after": asdict(after),
        "kept": after.share_of(before),
        "axes": axes,
        "notes": list(plan.notes),
    }
