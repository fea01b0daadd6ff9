"""A recipe: how to score, which axes to touch, how to spread the budget, how to make up for the loss. Papers are such."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from depgraph import DependencyGraph, Plan, Target
from depgraph.cutting.report import CutReport
from depgraph.errors import ScoreError
from depgraph.scoring import Scorer, Scores
from importance.compensation import Compensated, Compensation, compensate
from importance.statistics import Gathering, Statistics, collect
from importance.units import units


@dataclass(frozen=True)
class Pruned:
    """What a recipe made: the model, the plan that was cut, the report of the cut and its check, what took over what went."""

    model: nn.Module
    plan: Plan
    report: CutReport
    compensated: Compensated | None = None


class Prepared(Protocol):
    """A model that a recipe has changed before it plans, as a graph of its own, the scores of what may go, what to know of it.

    `settle` is told the plan, to finish the preparation for just that; the model that the graph was made of stays as it is.
    """

    @property
    def graph(self) -> DependencyGraph: ...

    @property
    def scores(self) -> Scores: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def settle(self, plan: Plan) -> None: ...


Prepare = Callable[[DependencyGraph], Prepared]


@dataclass(frozen=True)
class Recipe:
    """A score with all that goes with it.

    score: an estimator, with its data; None where `prepare` gives the scores, which changes a copy of the model first.
    batches: calibration data for the compensation (the score has its own), None without.
    units: a kind of `importance.units.KINDS`, which axes may lose groups. scope: how the budget is spread, see
    `depgraph.options.Options`. compensation: None leaves weights as they were. form: as `graph.plan`'s.
    """

    name: str
    score: Scorer | None
    batches: Iterable[Any] | None = None
    units: str = "units"
    scope: str = "axis"
    compensation: Compensation | None = None
    gathering: Gathering = Gathering()
    prepare: Prepare | None = None

    def plan(self, graph: DependencyGraph, target: Target, **options: Any) -> Plan:
        """The groups that go until `target` is met; `options` are those of `graph.plan` and go before the recipe's own.

        Where the recipe prepares a model, the plan is one for that: `plan.graph.model` is a changed copy.

        Raises: as `graph.plan` does, and as the score does.
        """
        return self._prepared(graph, target, options)

    def prune(self, graph: DependencyGraph, target: Target, **options: Any) -> Pruned:
        """Plan, cut a copy of the graph's model, check it, and let what stays make up for what went.

        Statistics of the score and of the compensation are gathered in one pass where both are from the same batches.

        Raises: as `graph.plan`, `plan.apply` and `importance.collect` do; the graph's model stays as it is in any case.
        """
        if self.prepare is not None:
            plan = self._prepared(graph, target, options)
            found = self._statistics(plan.graph)
        else:
            found = self._statistics(graph)
            score = self.score
            if found is not None and getattr(score, "data", None) is self.batches:
                score = replace(score, data=found)  # type: ignore[type-var]
            plan = self._planned(graph, score, target, options)
        report = plan.apply_with_report()
        done = None
        if self.compensation is not None and found is not None:
            done = compensate(report.model, plan, found, self.compensation)
        return Pruned(report.model, plan, report, done)

    def _prepared(self, graph: DependencyGraph, target: Target, options: dict[str, Any]) -> Plan:
        """A plan, of the model that was prepared for it where the recipe does that."""
        if self.prepare is None:
            return self._planned(graph, self.score, target, options)
        prepared = self.prepare(graph)
        plan = self._planned(prepared.graph, prepared.scores, _in_terms_of(prepared.graph, graph, target), options)
        prepared.settle(plan)
        return replace(plan, notes=(*plan.notes, *prepared.notes))

    def _planned(
        self, graph: DependencyGraph, score: Scorer | Scores | None, target: Target, options: dict[str, Any]
    ) -> Plan:
        if score is None:
            raise ScoreError(f"the recipe {self.name!r} has neither a score nor a step that prepares one")
        given = {"scope": self.scope, "only": tuple(units(graph, self.units)), **options}
        return graph.plan(score, target, **given)

    def _statistics(self, graph: DependencyGraph) -> Statistics | None:
        """What the compensation needs and, from the same batches, the score; None where there is nothing to make up."""
        if self.compensation is None or self.batches is None:
            return None
        needs = list(self.compensation.needs)
        if getattr(self.score, "data", None) is self.batches:
            needs += getattr(self.score, "needs", ())
        gathering = self.gathering
        if gathering.axes is None:
            gathering = replace(gathering, axes=frozenset(a.name for a in graph.axes if a.prunable.any()))
        return collect(graph, self.batches, needs, gathering)  # type: ignore[arg-type]


def _in_terms_of(prepared: DependencyGraph, dense: DependencyGraph, target: Target) -> Target:
    """A target for a model that may have become larger, whose shares are of the dense one."""
    now, was = prepared.dense_cost, dense.dense_cost
    return Target(**{m: share * min(1.0, getattr(was, m) / getattr(now, m)) for m, share in target.shares.items()})
