"""Axes and plans as tables to read, and as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from depgraph.axes import Axis
from depgraph.cutting.report import CutReport
from depgraph.dependency import DependencyGraph
from depgraph.inspecting import Inspection, share_range
from depgraph.layers import Layer
from depgraph.plan import Plan
from depgraph.report import METRICS, folded, ranges, uncovered, widths
from depgraph.widths import Cost
from depgraph.wording import counted

_SHOWN = 5  # names of dims that the table of what is fixed lists for one reason


def cost_table(before: Cost, after: Cost) -> Table:
    """Parameters, MACs and bytes before and after."""
    table = plain_table("", "before", "after", "kept")
    shares = after.share_of(before)
    for metric, word in METRICS.items():
        old, new = getattr(before, metric), getattr(after, metric)
        table.add_row(word, f"{old:,}", f"{new:,}", f"{shares[metric]:.1%}")
    return table


def widths_table(plan: Plan) -> Table:
    """Groups before and after, by kind of axis."""
    table = plain_table("axis", "groups", "left", "kept")
    for line in widths(plan):
        table.add_row(line.names, str(line.before), line.left, f"{line.share:.1%}")
    return table


def print_axes(found: Inspection, out: Console) -> None:
    """What `inspect` says: costs, a line for axes alike, what stays as it is and why."""
    cost, graph = found.graph.dense_cost, found.graph
    name = f"{graph.name}: {counted(len(graph.axes), 'axis', 'axes')}"
    costs = f"{cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes"
    out.print(f"{name}, {costs}\n", highlight=False)
    if graph.axes:
        out.print(axes_table(found))
        out.print(
            "\nshares are of parameters / MACs, for each of the axes alike (x); one group always stays, or what is chosen at a time",
            style="dim",
        )
    if found.fixed:
        out.print()
        out.print(fixed_table(found))
    for line in unknown_lines(graph):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def axes_table(found: Inspection) -> Table:
    """One line for axes that are alike in all but their numbers, with what they are and their name."""
    why = "check or reason"
    table = plain_table("what can only go together", "x", "groups", "may go", "one saves", "all save", why, left=why)
    for family in found.families:
        saved = [found.savings[axis.name] for axis in family.axes]
        shares = (
            share_range(found.graph.dense_cost, costs) for costs in ([s.one for s in saved], [s.all for s in saved])
        )
        cells = (str(len(family.axes)), str(family.size), str(family.free), *shares, family.note)
        table.add_row(escape(f"{family.what}\n  {family.names}"), *map(escape, cells))
    return table


def fixed_table(found: Inspection) -> Table:
    """What stays as it is, by reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what stays as it is", overflow="fold")
    table.add_column("dims", justify="right")
    table.add_column("of", overflow="fold")
    for fixed in found.fixed:
        more = len(fixed.dims) - _SHOWN
        dims = ", ".join(fixed.dims[:_SHOWN]) + (f" and {more} more (see --long)" if more > 0 else "")
        table.add_row(escape(fixed.heading), str(fixed.count), escape(dims))
    return table


def plain_table(first: str, *others: str, left: str = "") -> Table:
    """A table without lines: columns of numbers after the first, but for the one named `left`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == left else "right", overflow="fold")
    return table


def unknown_lines(graph: DependencyGraph) -> list[str]:
    """A line for each operator without a rule."""
    lines = []
    for operator, places in graph.unknown.items():
        where = ", ".join(dict.fromkeys(places))
        lines.append(f"no rule for {operator} ({len(places)} x, {where}): its dims are left alone")
    return lines


def graph_json(found: Inspection) -> dict[str, Any]:
    """All that `inspect` knows, as plain data."""
    graph = found.graph
    return {
        "model": graph.name,
        "cost": asdict(graph.dense_cost),
        "axes": [_axis_json(found, axis) for axis in graph.axes],
        "families": [{"what": f.what, "axes": [axis.name for axis in f.axes]} for f in found.families],
        "layers": [_layer_json(found, layer) for layer in found.anatomy.layers],
        "unknown_operators": graph.unknown,
        "fixed": [asdict(fixed) for fixed in found.fixed],
        "fixed_dims": [asdict(dim) for dim in uncovered(graph)],
        "note": graph.note,
    }


def _layer_json(found: Inspection, layer: Layer) -> dict[str, Any]:
    sides = {}
    for side, dim in (("out", layer.out), ("into", layer.into)):
        reached = None if dim is None else {"size": found.anatomy.size(dim), "axes": found.graph.widths.axes_of(dim)}
        sides[side] = reached
    return {"name": layer.name, "operator": layer.op, **sides, "params": layer.params, "macs": layer.macs}


def _axis_json(found: Inspection, axis: Axis) -> dict[str, Any]:
    by_reason: dict[str, list[int]] = {}
    for group, reason in axis.reasons.items():
        by_reason.setdefault(str(reason), []).append(group)
    said, saving = found.descriptions[axis.name], found.savings[axis.name]
    return {
        "name": axis.name,
        "what": str(said),
        "role": said.role,
        "where": said.where,
        "groups": axis.size,
        "prunable": int(axis.prunable.sum()),
        "exact": axis.exact,
        "mixed_by": list(axis.mixed_by),
        "saves": asdict(saving.all),
        "one_saves": asdict(saving.one),
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
        "model": plan.graph.name,
        "before": asdict(before),
        "after": asdict(after),
        "kept": after.share_of(before),
        "axes": axes,
        "notes": list(plan.notes),
    }


def cut_json(plan: Plan, report: CutReport) -> dict[str, Any]:
    """What was cut and checked, as data."""
    return plan_json(plan) | {
        "form": report.form,
        "check": asdict(report.check) | {"vacuous": report.check.vacuous} if report.check else None,
        "notes": [*plan.notes, *report.notes],
    }


def cut_lines(plan: Plan, report: CutReport) -> list[str]:
    """The same in lines."""
    return ["", f"form: {report.form}", f"check: {report.check}", *plan.notes, *report.notes]


def print_result(dense: Cost, plan: Plan, lines: Iterable[str], console: Console) -> None:
    """The costs before and after, what every axis loses, and lines of text."""
    console.print(cost_table(dense, plan.cost()))
    console.print()
    if plan.branches:
        console.print(f"left out: {', '.join(folded(plan.branches))}\n", markup=False, highlight=False, soft_wrap=True)
    if plan.removal or not plan.branches:
        console.print(widths_table(plan))
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def recipes_table(entries: Mapping[str, Any]) -> Table:
    """Recipes by name: their paper, what they need, what they cost, what data the paper had."""
    table = Table("recipe", "paper", "needs", "cost", "its data", title="depgraph prune --recipe NAME")
    table.columns[0].no_wrap = True  # a name that is cut off can't be given
    for name, entry in entries.items():
        table.add_row(name, entry.paper, entry.needs, entry.cost, entry.data)
    return table


def onnx_json(report: Any) -> dict[str, Any]:
    """What an export reports, as data."""
    return {**asdict(report), "path": str(report.path)}
