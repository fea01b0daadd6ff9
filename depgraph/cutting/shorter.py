"""Applying a plan that leaves branches out: first these, checked, then its axes on the shorter model."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

from depgraph.capture.capturing import capture
from depgraph.capture.exported import decisions_of
from depgraph.capture.proxies import no_flags
from depgraph.cutting.alone import apart_from_capture
from depgraph.cutting.bypassing import bypassed
from depgraph.cutting.comparing import TOLERANCE, difference
from depgraph.cutting.elsewhere import by_itself
from depgraph.cutting.inputs import describe_inputs
from depgraph.cutting.report import Check
from depgraph.cutting.rerunning import rerun
from depgraph.cutting.shortening import Shortening
from depgraph.errors import CheckError, PlanError

if TYPE_CHECKING:
    from depgraph.axes import Axis, Member
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan

FORMAT = 1


def check_shorter(plan: Plan, model: nn.Module, expected: list[torch.Tensor], dense: list[torch.Tensor]) -> Check:
    """Compare a shorter model with the captured program without those branches (`expected`), on the example inputs.

    It runs as it does for its user where it is the same as its capture then, else as it was captured, as in `Verifier.check`.
    Raises CheckError when they differ by more than rounding.
    """
    graph, decisions = plan.graph, decisions_of(plan.graph.capture.exported)
    tolerance = max((TOLERANCE.get(t.dtype, 1e-4) for t in expected if t.is_floating_point()), default=1e-4)
    error, captured = _error_alone(graph, model, expected), 0.0
    if not error <= tolerance:
        error = _error_as_captured(plan, model, expected, tolerance)
        if decisions is None and not isinstance(model, GraphModule):
            captured = apart_from_capture(graph, model, dense, tolerance)
    if decisions is not None and not isinstance(model, GraphModule):
        by_itself(graph, model, (graph.args, graph.kwargs))
    moved = difference(expected, dense)
    return Check(error, moved, tolerance, 0, 0, branches=len(plan.branches), captured=captured)


def _error_alone(graph: DependencyGraph, model: nn.Module, expected: list[torch.Tensor]) -> float:
    try:
        return difference(rerun(graph, model, within=no_flags), expected)
    except Exception:  # what is wrong shows better where the model runs as it was captured
        return math.inf


def _error_as_captured(plan: Plan, model: nn.Module, expected: list[torch.Tensor], tolerance: float) -> float:
    try:
        got = rerun(plan.graph, model)
    except Exception as failure:
        text = str(failure).strip().splitlines()
        raise CheckError(
            f"{type(model).__name__} doesn't run without {plan.branches[0]}: {type(failure).__name__}: {text[0] if text else ''}"
        ) from failure
    error = difference(got, expected)
    if not error <= tolerance:
        raise CheckError(
            f"{type(model).__name__} without {plan.branches[0]} differs from the captured program without that by {error:.1e} of the "
            f"largest output (allowed {tolerance:.0e}): something that it computes is read elsewhere"
        )
    return error


def references(plan: Plan) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs of the captured program without the plan's branches, and with them, on the original's weights."""
    graph = plan.graph
    if graph.on_meta:
        return [], []
    return tuple(bypassed(graph, names).run(graph.args, graph.kwargs) for names in (plan.branches, ()))  # type: ignore[return-value]


def record_of(plan: Plan, how: Shortening, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """JSON-able: all that is needed to leave the same out again, as `record.make_record` for axes."""
    graph, done = plan.graph, how.to_json(plan.graph.model)
    after = type(plan).of(graph, {}, branches=plan.branches).cost()
    return {
        "format": FORMAT,
        "form": "depth",
        "branches": list(plan.branches),
        "shortening": done,
        "removed": [],
        "attributes": done["attributes"],
        "axes": {},
        "groups": {},
        "config": {},
        "free": sorted(graph.free),
        "inputs": describe_inputs(graph.args, graph.kwargs),
        "vocabulary": {},
        "cost": {"before": asdict(graph.dense_cost), "after": asdict(after)},
        "original": {},
        "earlier": [*earlier["earlier"], {k: v for k, v in earlier.items() if k != "earlier"}] if earlier else [],
    }


def graph_of(plan: Plan, model: nn.Module) -> DependencyGraph:
    """The graph of the shorter model."""
    graph = plan.graph
    captured = capture(model, graph.args, graph.kwargs)
    return type(graph)(model, graph.args, graph.kwargs, captured, graph.free)


def carried(plan: Plan, names: dict[str, str], shorter: DependencyGraph) -> Plan:
    """The plan's axes on the shorter model's graph, in which tensors have other `names` (see `renamed`).

    Raises PlanError where the axes of the two don't match, so that other parameters would go than the plan says.
    """
    members: dict[tuple[str, int], list[tuple[Axis, Member]]] = {}
    for axis in shorter.axes:
        for member in axis.members:
            members.setdefault((member.target, member.dim), []).append((axis, member))
    removal: dict[str, set[int]] = {}
    for member, groups in ((m, groups) for name, groups in plan.removal.items() for m in plan.graph[name].members):
        for axis, other in members.get((names.get(member.target, ""), member.dim), ()):
            matched = _matched(member.labels, other.labels)
            if matched is not None:
                removal.setdefault(axis.name, set()).update(matched[g] for g in groups if g in matched)
    found = replace(type(plan).of(shorter, removal, plan.notes), config=dict(plan.config))
    if found.cost().params != plan.cost().params:
        raise PlanError(
            f"not all axes of the plan have a counterpart once {plan.branches[0]} is left out: make the plan in two steps"
        )
    return found


def _matched(old: np.ndarray, new: np.ndarray) -> dict[int, int] | None:
    """Which groups of one labelling are which of another of the same dim; None where they aren't the same sets of indices."""
    if old.shape != new.shape or not ((old >= 0) == (new >= 0)).all():
        return None
    pairs = set(zip(old[old >= 0].tolist(), new[old >= 0].tolist(), strict=True))
    found = dict(pairs)
    return found if len(found) == len(pairs) == len(set(found.values())) else None


def renamed(model: nn.Module, how: Shortening) -> dict[str, str]:
    """What parameters and buffers that stay are called in the shorter model."""
    now: dict[str, str | None] = dict.fromkeys((*how.passed, *how.blank))
    for container in {container for container, _ in how.entries}:
        gone = {index for c, index in how.entries if c == container}
        holder, place = model.get_submodule(container), 0
        for k, name in enumerate(holder._modules):
            stays = name if isinstance(holder, nn.ModuleDict) else str(place)
            now[f"{container}.{name}" if container else name] = None if k in gone else stays
            place += k not in gone
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: new for name, _ in named if (new := _moved(name, now)) is not None}


def _moved(name: str, now: dict[str, str | None]) -> str | None:
    """A name with the last part of each of its modules as `now` has it; None where one of these leaves."""
    old, new = "", list[str]()
    for part in name.split("."):
        old = f"{old}.{part}" if old else part
        becomes = now.get(old, part)
        if becomes is None:
            return None
        new.append(becomes)
    return ".".join(new)


def together(first: Check | None, second: Check | None) -> Check | None:
    """Both checks of a cut in two steps as one: the larger error, and what moved the output further."""
    if first is None or second is None or first.skipped or second.skipped:
        return first if second is None or second.skipped else second
    return replace(
        second,
        error=max(first.error, second.error),
        sensitivity=max(first.sensitivity, second.sensitivity),
        tolerance=max(first.tolerance, second.tolerance),
        exact_axes=first.exact_axes + second.exact_axes,
        mixed_axes=first.mixed_axes + second.mixed_axes,
        calls=max(first.calls, second.calls),
        branches=first.branches + second.branches,
        chosen=first.chosen + second.chosen,
        rounding=max(first.rounding, second.rounding),
        captured=max(first.captured, second.captured),
    )
