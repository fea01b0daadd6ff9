"""Making a plan: the choice of groups that meets the target, in the way that suits the module best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from depgraph.axes import build_axes
from depgraph.choosing import Attempt, Choice
from depgraph.classes import Classes
from depgraph.customs import customs_that_hold
from depgraph.cutting.expressible import is_expressible
from depgraph.cutting.settling import inexpressible
from depgraph.errors import DepgraphError, NothingToPrune, TargetError
from depgraph.nearing import nearer, why_far
from depgraph.options import Options
from depgraph.plan import Plan
from depgraph.report import uncovered
from depgraph.scoring import Scorer, Scores, checked_scores
from depgraph.target import Target

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_ATTEMPTS = {
    "graph": (Attempt(settle=False),),
    "auto": (Attempt(bold=True), Attempt(), Attempt(settle=False)),
    "module": (Attempt(bold=True, express=True), Attempt(pin=True)),
    "uniform": (Attempt(pin=True),),
}
_EXPRESSED = (Attempt(bold=True, express=True), Attempt(express=True), Attempt(pin=True, express=True))
_MOST_STEPS = 8  # back from what can't be expressed
_DEARER, _SHORT = 1.5, 0.03  # how much more of its axes, and of the budget, a plan may take for the module's sake
_MOSTLY, _HARDLY = 0.5, 0.1  # of parameters, and of the groups of an axis

_SAY_NOTHING = (
    "the scores say nothing: on every axis they are equal for all groups, of which the first go; look for data that are a single row or "
    "all the same, and for a loss without gradients"
)


def make_plan(graph: DependencyGraph, scorer: Scorer | Scores, target: Target, **given: Any) -> Plan:
    """Choose groups by `scorer` until `target` is met, within the cost of one group (or of one tied set of them).

    Raises:
        NothingToPrune: no axis may lose a group.
        TargetError: the floors and protections don't let the model become that small.
        ScoreError: the scores don't fit the axes or aren't finite.
        PlanError: an option is unknown or out of range, a pattern names no axis, or the model has changed.
    """
    options = Options.of(given)
    plan = _made(graph, scorer, target, options)
    hollow = _hollow(plan) if not options.floor and plan.cost().params > graph.cost().params * _MOSTLY else ""
    return replace(plan, notes=(*plan.notes, hollow)) if hollow else plan


def _made(graph: DependencyGraph, scorer: Scorer | Scores, target: Target, options: Options) -> Plan:
    if options.scope == "auto":
        options = replace(options, scope="global" if getattr(scorer, "comparable", True) else "axis")
    if options.form == "auto":
        options = replace(options, form=graph.form)
    if not isinstance(target, Target):
        raise TargetError(f"expected a Target such as depgraph.Target(params=0.7), got {target!r}")
    options.check_patterns(graph)
    if not any(axis.prunable.any() for axis in graph.axes):
        raise NothingToPrune(_nothing(graph))
    graph.check_unchanged()
    by_density = options.rank == "auto" and getattr(scorer, "additive", False) or options.rank == "density"
    scores = checked_scores(graph, scorer)
    choice, plan = _nearest(graph, scores, target, options, by_density=by_density)
    notes = [_SAY_NOTHING] if callable(scorer) and _alike(graph, scores) else []
    if not plan.removal and not plan.branches:
        notes.append("the model keeps within the target as it is, so that nothing goes")
    elif options.form == "auto" and options.scope != "uniform" and not is_expressible(graph, plan.kept()):
        found = _in_module(plan, choice.share, scores, target, options, by_density=by_density)
        choice, plan = found or (choice, plan)
    notes += [far] if (far := why_far(choice, plan)) else []
    return replace(plan, notes=(*plan.notes, *notes))


def _hollow(plan: Plan) -> str:
    """What to know of a plan for a model that stays mostly as it is, but for some axes that hardly stay; empty for nothing."""
    sizes = {name: plan.graph[name].size for name in plan.removal}
    left = {name: size - len(plan.removal[name]) for name, size in sizes.items()}
    hollow = [name for name in left if left[name] < sizes[name] * _HARDLY]
    if not hollow:
        return ""
    least = min(hollow, key=lambda name: left[name] / sizes[name])
    return (
        f"{len(hollow)} of {len(plan.graph.axes)} axes keep less than a tenth of their groups, {least!r} {left[least]} of {sizes[least]}: "
        f"floor={_HARDLY} keeps a tenth of each"
    )


def _alike(graph: DependencyGraph, scores: Mapping[str, np.ndarray]) -> bool:
    """Are the scores of all groups of an axis that may go equal, on every axis that has two or more?"""
    free = [scores[axis.name][axis.prunable] for axis in graph.axes if axis.prunable.sum() > 1]
    return bool(free) and all(float(np.ptp(found)) == 0.0 for found in free)


def _in_module(
    plan: Plan, share: float, scores: Mapping[str, np.ndarray], target: Target, options: Options, *, by_density: bool
) -> tuple[Choice, Plan] | None:
    """A plan for the same target that the module's own Python can express, where it costs the other axes little more.

    Not one that takes half as much again of the axes that it narrows, nor one that goes far below the target.
    """
    options = replace(options, form="module")

    def suits(choice: Choice, found: Plan) -> bool:
        return choice.share <= _DEARER * share and choice.slack(found) <= _SHORT

    for number, attempt in enumerate(_EXPRESSED):
        try:
            choice = _choice(plan.graph, scores, target, options, attempt, by_density=by_density)
        except NothingToPrune:
            continue
        found = choice.plan()
        if found is not None and number == 0:
            again = partial(_choice, plan.graph, scores, target, options, by_density=by_density)
            choice, found = nearer(choice, found, again)
        if found is not None and suits(choice, found):
            return choice, found
    last = _backing_off(plan.graph, scores, target, options, by_density=by_density)
    return last if last is not None and suits(*last) else None


def _choice(
    graph: DependencyGraph,
    scores: Mapping[str, np.ndarray],
    target: Target,
    options: Options,
    attempt: Attempt,
    *,
    by_density: bool,
) -> Choice:
    """Raises NothingToPrune where no group may go."""
    choice = Choice(graph, dict(scores), target, options, attempt)
    if by_density:
        choice.weigh()
    return choice


def _backing_off(
    graph: DependencyGraph, scores: Mapping[str, np.ndarray], target: Target, options: Options, *, by_density: bool
) -> tuple[Choice, Plan] | None:
    """A plan that leaves whole what kept the plans before it from being expressed; None where that leads to none."""
    barred = inexpressible(graph)
    for _ in range(_MOST_STEPS):
        try:
            choice = _choice(graph, scores, target, options, Attempt(barred=barred), by_density=by_density)
        except NothingToPrune:
            return None
        plan = choice.plan()
        if plan is None or is_expressible(graph, plan.kept()):
            return None if plan is None else (choice, plan)
        found = _in_the_way(plan)
        if found <= barred:
            return None
        barred |= found
    return None


def _in_the_way(plan: Plan) -> frozenset[str]:
    """The axes that a plan narrows and that reach operators whose sizes the module's Python gets wrong then."""
    sizes = plan.graph.sizes
    nodes = {node for conflict in sizes.solve(plan.kept()).conflicts for node in conflict.nodes}
    return frozenset(name for node in nodes for name in sizes.axes_of(node) if name in plan.removal)


def _nearest(
    graph: DependencyGraph, scores: Mapping[str, np.ndarray], target: Target, options: Options, *, by_density: bool
) -> tuple[Choice, Plan]:
    """The plan of the first attempt that comes within one step of the target, else of the nearest, and its choice."""
    found: list[tuple[Choice, Plan]] = []
    refusals: list[tuple[float, DepgraphError]] = []
    for attempt in _ATTEMPTS["uniform" if options.scope == "uniform" and graph.form != "graph" else options.form]:
        try:
            choice = _choice(graph, scores, target, options, attempt, by_density=by_density)
        except NothingToPrune as error:
            refusals.append((math.inf, error))
            continue
        plan = choice.plan()
        if attempt.pin and options.form == "module" and plan is not None and not is_expressible(graph, plan.kept()):
            backed_off = _backing_off(graph, scores, target, options, by_density=by_density)
            choice, plan = backed_off or (choice, plan)
        if plan is None:
            least = choice.budget.spent_at(choice.least)[choice.budget.metric]
            above = least / max(choice.budget.limits[choice.budget.metric], choice.budget.least(choice.budget.metric))
            unmet = choice.refusal()
            refusals.append((least, TargetError(unmet.sentence(target, graph.dense_cost), above, unmet)))
            continue
        found.append((choice, plan))
        if choice.is_near(plan):
            found = found[-1:]
            break
    if not found:
        raise min(refusals, key=lambda entry: entry[0])[1]
    choice, plan = min(found, key=lambda one: one[0].slack(one[1]))
    if options.scope == "uniform":
        return choice, plan
    again = partial(_choice, graph, scores, target, options, by_density=by_density)
    return nearer(choice, plan, again)


def _nothing(graph: DependencyGraph) -> str:
    stay = [axis.why_fixed for axis in graph.axes if axis.reasons] or [dim.reason for dim in uncovered(graph)]
    why = f"each is fixed, the first because of {stay[0]}" if stay else "it has no parameters"
    ways = " or ".join(f"free={list(ways)}" for ways in _customs(graph))
    held = "".join(f"; {clause}" for clause in customs_that_hold(graph).values())
    return f"{graph.name} has no axis that could lose a group: {why}{held}{f'; some could with {ways}' if ways else ''}"


def _customs(graph: DependencyGraph) -> list[tuple[str, ...]]:
    """Which inputs and outputs would have to change their sizes for something to go: each that is enough alone, then several."""
    program = graph.capture.program
    every = [*program.inputs, *program.outputs]

    def frees(lifts: Iterable[str]) -> bool:
        classes = Classes.of(program, graph.free | frozenset(lifts))
        return any(axis.prunable.any() for axis in build_axes(program, classes))

    alone = [lift for lift in every if frees([lift])]
    rest = [lift for lift in every if lift not in alone]
    if not frees(rest):
        return [(lift,) for lift in alone]
    for lift in [*rest]:
        fewer = [other for other in rest if other != lift]
        rest = fewer if frees(fewer) else rest
    return [*((lift,) for lift in alone), tuple(rest)]
