"""Blocks and branches in the command: what `prune` is asked of them, and what `inspect --depth` says."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from depgraph.cli import options as o
from depgraph.dependency import DependencyGraph
from depgraph.plan import Plan
from depgraph.storage import check_free
from depgraph.target import Target

_USUAL = {"both": "loss:branches"}  # the depth score of a scope, where none is named


def asked(wish: o.Wish, depth_score: str, plot: Path | None) -> o.Wish:
    """The wish with what is to be left out; raises typer.BadParameter for options that contradict one another."""
    scope, counted = wish.scope, "left_out" in wish.keep.given
    wants = bool(depth_score) or counted or scope in ("depth", "both")
    if wants and (wish.recipe or wish.allocation):
        other = f"--recipe {wish.recipe}" if wish.recipe else f"--allocation {wish.allocation}"
        raise typer.BadParameter(f"{other} chooses groups only: leave out --depth, --depth-score and --scope {scope}")
    if scope == "both" and counted:
        raise typer.BadParameter("--scope both finds out how many blocks go: leave out --depth")
    if plot is not None:
        check_free(plot, "--plot")
    if counted and len(wish.keep.given) == 1 and not wish.keep.timed and scope == "auto":
        wish = replace(wish, options=wish.options | {"scope": "depth"})
    score = depth_score or (_USUAL.get(scope, "shortgpt") if wants else "")
    return replace(wish, depth_score=score, plot=plot)


def depth_needs(wish: o.Wish) -> bool:
    """Is data needed to find what is left out?"""
    from importance.depth import depth_needs_data

    return bool(wish.depth_score) and depth_needs_data(wish.depth_score)


def plan_with_depth(wish: o.Wish, target: Target, graph: DependencyGraph, scorer: Any, data: tuple[Any, Any]) -> Plan:
    """The plan for a wish: groups, blocks and branches, or both; `data` are batches and the loss."""
    batches, loss = data
    from importance.depth import InLoss, LossMetric, depth_named

    if not wish.depth_score:
        return graph.plan(scorer, target, **wish.options)
    depth = depth_named(wish.depth_score, batches, loss, wish.loading.seed)
    if wish.scope == "depth":
        return graph.plan(depth, target, **wish.options)
    if wish.scope == "both":
        metric = None if loss is None else LossMetric(loss, nonnegative=False)
        scorer = InLoss(scorer, list(batches), metric=metric)
    return graph.plan(scorer, target, depth=depth, **wish.options)


def depth_json(graph: DependencyGraph) -> dict[str, Any]:
    """What `inspect --depth` says, as plain data."""
    keys = ("name", "kind", "params", "macs", "order", "container", "index", "branches")
    parts = {"blocks": graph.blocks, "branches": graph.branches}
    listed = {what: [{k: v for k, v in asdict(p).items() if k in keys} for p in found] for what, found in parts.items()}  # type: ignore[call-overload]
    return {"model": graph.name, "cost": asdict(graph.dense_cost), **listed, "stay": graph.branches_refused}


def print_depth(graph: DependencyGraph, out: Console) -> None:
    """Branches by depth with what each would save and the block that holds it, and why others can't go."""
    cost, owner = graph.dense_cost, {name: block.name for block in graph.blocks for name in block.branches}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("branch", "kind", "block"):
        table.add_column(name, overflow="fold")
    for name in ("parameters", "MACs"):
        table.add_column(name, justify="right")
    for branch in graph.branches:
        shares = (f"{branch.params / max(cost.params, 1):.1%}", f"{branch.macs / max(cost.macs, 1):.1%}")
        table.add_row(escape(branch.name), branch.kind, escape(owner.get(branch.name, "-")), *shares)
    out.print(
        f"{graph.name}: {len(graph.blocks)} blocks and {len(graph.branches)} branches can be left out\n",
        highlight=False,
    )
    if graph.branches:
        out.print(table)
    for name, why in graph.branches_refused.items():
        out.print(f"{name} stays: {why}", markup=False, highlight=False, soft_wrap=True)
