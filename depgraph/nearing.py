"""Coming nearer to a target that a plan ends far below, as its last step was a coarse one, and saying so where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from depgraph.budget import LATENCY
from depgraph.errors import NothingToPrune
from depgraph.plan import Plan

if TYPE_CHECKING:
    from depgraph.choosing import Attempt, Choice, Counts

_MOST_TRIES = 8  # plans with less of a coarse axis
_NEAR, _TOLD = 0.03, 0.05  # how far below a target, as a share of it, calls for them, and for saying why
_FAR = 0.1  # and where a step is one group, which is what a plan may take too much
Again = Callable[["Attempt"], "Choice"]


def nearer(choice: Choice, plan: Plan, again: Again) -> tuple[Choice, Plan]:
    """What comes nearest to the target: `plan`, or one in which coarse axes lose a step less, or nothing, and others make up for it.

    `again` makes the choice for the same target in another attempt; it raises NothingToPrune where no group may go.
    """
    if choice.slack(plan) <= _NEAR or LATENCY in choice.budget.limits:
        return choice, plan
    best, tried, limits = (choice, plan), set[tuple[str, int]](), _limits(choice, plan)
    for _ in range(_MOST_TRIES):
        limit = next((one for one in limits if one not in tried), None)
        if limit is None or best[0].slack(best[1]) <= _NEAR:
            break
        tried.add(limit)
        other = _held_back(best[0], limit, again)
        if other is not None and other[0].slack(other[1]) < best[0].slack(best[1]):
            best, limits = other, _limits(*other)
    return best


def _limits(choice: Choice, plan: Plan) -> list[tuple[str, int]]:
    """How many groups coarse axes may lose, to be tried in turn: a step less than they do, and none."""
    return [(name, most) for name in _coarse(choice, plan) for most in (len(plan.removal[name]) - 1, 0)]


def why_far(choice: Choice, plan: Plan) -> str:
    """Of a plan that ends far below its target, by how much and which step is the smallest that there is; empty where it is near."""
    measure = choice.budget.metric
    if not plan.removal or choice.slack(plan) <= _TOLD or measure == LATENCY:
        return ""
    dense, stays = choice.budget.spent({})[measure], choice.budget.spent_at(plan.kept())[measure]
    said = f"{stays / dense:.1%} of {measure} stay where {choice.limit / dense:.1%} may"
    steps = {name: _step(choice, name) for name in choice.leading}
    name = max(steps, key=lambda n: choice.spent(steps[n]))
    if sum(steps[name].values()) == 1 and choice.slack(plan) <= _FAR:
        return ""
    saved = dense - choice.spent(steps[name])
    if saved < choice.limit - stays:
        return said
    others = sum(1 for count in steps[name].values() if count) - 1
    along = f" and groups of {f'{others} more axes' if others > 1 else 'one more axis'}" if others else ""
    groups = f"{steps[name][name]} of the {choice.graph[name].size} groups of axis {name!r}"
    return f"{said}: the smallest step, {groups}{along}, is {saved / dense:.1%}"


def _coarse(choice: Choice, plan: Plan) -> list[str]:
    """Axes that a plan narrows, the one whose smallest step saves most with what goes along first; of those that go together, one.

    Those whose step is one group aren't, unless it alone takes far more than all that is asked for.
    """
    found: dict[frozenset[str], tuple[float, int, str]] = {}
    for name in plan.removal.keys() & set(choice.leading):
        step = _step(choice, name)
        names = frozenset(n for n, count in step.items() if count)
        one = (choice.spent(step), -len(choice.graph[name].members), name)
        if sum(step.values()) > 1 or one[0] < (1 - _FAR) * choice.limit:
            found[names] = min(found.get(names, one), one)
    return [name for _, _, name in sorted(found.values())]


def _step(choice: Choice, name: str) -> Counts:
    """The smallest numbers of groups that may go where one of an axis does."""
    axis, cap = choice.graph[name], choice.cap[name]
    least = next(count for count in range(1, cap + 1) if choice.rounded(axis, count))
    step = {name: choice.rounded(axis, least)}
    return step if choice.settler is None else choice.settler.settle(step)


def _held_back(choice: Choice, limit: tuple[str, int], again: Again) -> tuple[Choice, Plan] | None:
    """The choice and plan in which an axis loses at most so many groups; None where there is none."""
    held = replace(choice.attempt, most={**choice.attempt.most, **dict([limit])})
    for attempt in [held, *([replace(held, bold=False)] if held.bold else [])]:
        try:
            found = again(attempt)
        except NothingToPrune:
            continue
        plan = found.plan()
        if plan is not None:
            return found, plan
    return None
