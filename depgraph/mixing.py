"""Making a plan of widths and depth: groups alone, branches and blocks alone, one after the other, or both in one ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from depgraph.depth import Names, chosen, is_met, ranked, spent
from depgraph.errors import NothingToPrune, PlanError, ScoreError, TargetError
from depgraph.options import Options
from depgraph.plan import Plan
from depgraph.planning import make_plan
from depgraph.scoring import Depth, Scorer, Scores, checked_depth, checked_scores, is_search
from depgraph.target import Target

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_PATIENCE = 3  # branches that make the sum of scores no lower, before the search for the best number of them ends
_TINY = 1e-9  # of the dense cost: a branch that saves nothing goes last


def plan_of(graph: DependencyGraph, scorer: Scorer | Scores | Depth, target: Target, given: Mapping[str, Any]) -> Plan:
    """Choose groups, branches and blocks until `target` is met; see `depgraph.options.Options`.

    Raises what `planning.make_plan` and `depth.chosen` raise; PlanError for options that contradict one another, ScoreError
    where groups and branches are to compete and their scores aren't changes of the same.
    """
    options = Options.of(given)
    if not isinstance(target, Target):
        raise TargetError(f"expected a Target such as depgraph.Target(params=0.7), got {target!r}")
    width = {name: value for name, value in given.items() if name not in ("scope", "depth", "depth_share")}
    if options.scope == "depth":
        if options.depth is not None:
            raise PlanError("scope='depth' takes the scores of blocks or branches as the scorer: leave depth= out")
        graph.check_unchanged()
        names = chosen(graph, cast(Depth, scorer), target, options.branches)
        return Plan.of(graph, {}, branches=(*options.branches, *names))
    if options.scope == "both":
        return _Both(graph, cast("Scorer | Scores", scorer), target, width, options).best()
    if options.depth is None:
        if target.left_out is not None:
            raise TargetError(
                f"target {target} counts blocks or branches: use scope='depth', or give a share of groups too"
            )
        return make_plan(graph, cast("Scorer | Scores", scorer), target, **given)
    return _depth_first(graph, cast("Scorer | Scores", scorer), target, width | {"scope": options.scope}, options)


def _depth_first(
    graph: DependencyGraph, scorer: Scorer | Scores, target: Target, width: dict[str, Any], options: Options
) -> Plan:
    """Leave out what the target, or the share of it that is meant for depth, asks for; then choose groups of what is left."""
    if not target.shares and target.latency is None and target.most_bytes is None:
        raise TargetError(
            f"target {target} leaves nothing for the groups to do: use scope='depth', or give a share too"
        )
    graph.check_unchanged()
    first = Target(left_out=target.left_out) if target.left_out is not None else _part(graph, target, options)
    names = (*options.branches, *chosen(graph, options.depth, first, options.branches))
    if is_met(graph, names, target):
        return Plan.of(graph, {}, branches=names)
    return make_plan(graph, scorer, replace(target, left_out=None), **width | {"branches": names})


def _part(graph: DependencyGraph, target: Target, options: Options) -> Target:
    """The part of a target that is meant for depth: so much of what is to go, of every measure."""
    share = options.depth_share
    found: dict[str, Any] = {m: 1 - share * (1 - kept) for m, kept in target.shares.items()}
    if target.most_bytes is not None:
        now = graph.dense_cost.bytes
        found["bytes"] = max(round(now - share * (now - target.most_bytes)), target.most_bytes)
    if target.latency_ms is not None and target.latency is not None:
        dense = target.latency.ms(graph.widths.at({}))
        found["latency_ms"] = max(dense - share * (dense - target.latency_ms), target.latency_ms)
    return replace(target, **found)


@dataclass(frozen=True)
class _Scored:
    """A plan, and the sum of the scores of all that goes."""

    plan: Plan
    loss: float


class _Both:
    """Branches and groups in competition: scores being changes of one loss, the plan that meets the target for the least sum.

    Branches are ranked by score per cost. For each beginning of that ranking the groups that go beside it are chosen by the
    same; the sum falls and then rises, so the search ends when some more branches haven't made it lower.
    """

    def __init__(
        self, graph: DependencyGraph, scorer: Scorer | Scores, target: Target, width: dict[str, Any], options: Options
    ) -> None:
        if target.left_out is not None:
            raise TargetError(f"scope='both' finds out how many are left out: give shares alone, not {target}")
        if options.depth is None:
            raise PlanError("scope='both' needs depth=, the scores of blocks or branches, beside the scorer of groups")
        _require_same_unit(scorer, options.depth)
        graph.check_unchanged()
        self.graph, self.target, self.base = graph, target, options.branches
        self.width = {"rank": "density"} | width | {"scope": "global"}
        self.depth = checked_depth(graph, options.depth)
        self.scores = checked_scores(graph, scorer)
        self.dense = spent(graph, (), target)
        density = {n: score / self._saved(n) for n, score in self.depth.items()}
        self.ranking = ranked(graph, density, self.base)

    def best(self) -> Plan:
        """The plan of the least sum; raises TargetError where none meets the target."""
        found: list[_Scored] = []
        refusal: Exception | None = None
        best = -1
        for count in range(len(self.ranking) + 1):
            try:
                found.append(self._with(self.ranking[:count]))
            except (TargetError, NothingToPrune) as error:
                refusal = error
                continue
            best = len(found) - 1 if best < 0 or found[-1].loss < found[best].loss else best
            if not found[-1].plan.removal or len(found) - 1 - best >= _PATIENCE:
                break
        if not found:
            raise refusal or TargetError(f"a target of {self.target} can't be met")
        return found[best].plan

    def _saved(self, name: str) -> float:
        """What a block or branch costs, in the first measure of the target."""
        measure, dense = next(iter(self.dense.items()))
        return max(dense - spent(self.graph, [name], self.target)[measure], dense * _TINY)

    def _with(self, names: Names) -> _Scored:
        """Groups chosen beside some branches, if the target isn't met without these alone."""
        gone = (*self.base, *names)
        if is_met(self.graph, gone, self.target):
            plan = Plan.of(self.graph, {}, branches=gone)
        else:
            plan = make_plan(self.graph, self.scores, self.target, **self.width | {"branches": gone})
        dead = self.graph.left_out(gone).parameters if gone else frozenset()
        alive = (n for n in plan.removal if not all(m.target in dead for m in self.graph[n].members))
        groups = sum(float(np.sum(self.scores[n][list(plan.removal[n])])) for n in alive)
        return _Scored(plan, math.fsum([groups, *(self.depth[n] for n in names)]))


def _require_same_unit(scorer: Scorer | Scores, depth: Depth) -> None:
    """Numbers that are given by name are taken as they are."""
    if is_search(depth):
        raise ScoreError(
            f"{type(depth).__name__} is a search and gives no scores to compare with those of groups: use scores"
        )
    units = [getattr(one, "unit", "") for one in (scorer, depth) if not isinstance(one, Mapping)]
    if units and ("" in units or len(set(units)) > 1):
        names = " and ".join(type(one).__name__ for one in (scorer, depth))
        raise ScoreError(
            f"the scores of {names} aren't changes of the same, so that groups and branches can't compete: use "
            "importance.depth.InLoss(scorer, batches) for groups and importance.depth.LossIncrease(batches) for branches"
        )
