"""Can the module form make a cut, all told: sizes, numbers computed from sizes, and tensors that aren't the module's own?"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from depgraph.cutting.absorbing import beyond, can_absorb
from depgraph.cutting.expressing import Conflict, Solution
from depgraph.cutting.module import narrowed, plain_tensor
from depgraph.errors import CutError
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan


def is_expressible(graph: DependencyGraph, kept: Kept, held: Container[str] | None = None) -> bool:
    """Whether the module's own Python computes this cut, as far as can be told without making it.

    `held` are the names of the tensors that the module holds; who asks of many cuts finds them once.
    """
    if not beyond(graph).isdisjoint(kept.masks):
        return False
    kept = kept.of_dims()
    solution = graph.sizes.solve(kept)
    if solution.conflicts or not can_absorb(graph, solution.drifts):
        return False
    held = graph.held() if held is None else held
    return all(v.target in held or plain_tensor(graph, v) is not None for v in narrowed(kept))


def expressed(plan: Plan) -> Solution:
    """What the module's Python must become for a plan; raises CutError where it can't express that."""
    solution = plan.graph.sizes.solve(plan.kept())
    if solution.conflicts:
        raise CutError(_refusal(plan, solution.conflicts))
    return solution


def _refusal(plan: Plan, conflicts: list[Conflict]) -> str:
    more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
    graph = "" if plan.graph.form == "module" else "use form='graph' (or 'auto'), or "
    return (
        f"the code of {type(plan.graph.model).__name__} can't express this cut, {conflicts[0]}{more}; "
        f"{graph}plan with form='module' to leave such axes whole"
    )
