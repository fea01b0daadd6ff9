"""A recipe: how to score, which axes to touch, how to spread the budget, how to make up for the loss. Papers are such."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from depgraph import Cost, DependencyGraph, Plan, Target
from depgraph.budget import LATENCY
from depgraph.cutting.report import CutReport
from depgraph.errors import PlanError, ScoreError
from depgraph.options import SCOPES
from depgraph.scoring import Scorer, Scores, checked_scores, require_graph
from depgraph.unmet import in_words_of
from importance.allocations import Allocated, Allocation
from importance.choices import pick
from importance.collector import Gathering
from importance.compensation import Compensated, Compensation, compensate
from importance.propagation import PROPAGATIONS, ByAxis, Known, reordered, sequential
from importance.refitting import refit
from importance.schedule import Schedule, Scheduled
from importance.statistics import Statistics, collect
from importance.stepping import shares_of
from importance.units import units


@dataclass(frozen=True)
class Pruned:
    """What a recipe made: the model, and what took over what went.

    In one shot, `plan` is what was cut and `report` tells of the cut and its check. In steps, `scheduled` tells of each, and `plan`
    is one of the first graph for all of them, None where that can't be told.
    """

    model: nn.Module
    plan: Plan | None
    report: CutReport | None
    compensated: Compensated | None = None
    scheduled: Scheduled | None = None

    @property
    def after(self) -> Cost:
        """What the pruned model costs."""
        if self.report is not None:
            return self.report.after
        assert self.scheduled is not None
        return self.scheduled.after

    @property
    def error(self) -> float | None:
        """The error of the check, in steps the largest; None where nothing was checked."""
        checks = [self.report.check] if self.report is not None else [s.check for s in self.scheduled.steps]  # type: ignore[union-attr]
        return max((check.error for check in checks if check is not None), default=None)


class Prepared(Protocol):
    """A model that a recipe has changed before it plans, as a graph of its own, the axes that may lose groups, what these are worth,
    and what to know of it.

    `settle` is told the plan, to finish the preparation for just that; the model that the graph was made of stays as it is.
    """

    @property
    def graph(self) -> DependencyGraph: ...

    @property
    def axes(self) -> tuple[str, ...]: ...

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
    `depgraph.options.Options`; allocation: one that is spread by instead. compensation: None leaves weights as they were;
    in steps it follows each cut. schedule: the steps, or a function of the target that gives them, such as
    `importance.Pace(0.05)`; None prunes in one shot. protect: finds the axes of a graph that lose nothing, unless a `protect`
    option says which. afterwards: called with the pruned model in the end, one after the other, such as
    `importance.Reestimation(batches)`; they may change weights. propagation: "dense", or in
    one shot "sequential", which scores each consumer where all before it is pruned (and has made up for that, if `compensation` is
    set), by scores that need no gradients, such as `Activation` and `OptimalBrain`. How much each axis loses is still spread
    by the scores of the whole model. Steps score what the one before left anew, so they need no such thing.
    """

    name: str
    score: Scorer | None
    batches: Iterable[Any] | None = None
    units: str = "units"
    scope: str = "axis"
    compensation: Compensation | None = None
    gathering: Gathering = Gathering()
    allocation: Allocation | None = None
    schedule: Schedule | Callable[[Target], Schedule] | None = None
    protect: Callable[[DependencyGraph], tuple[str, ...]] | None = None
    afterwards: tuple[Callable[[nn.Module], Any], ...] = ()
    prepare: Prepare | None = None
    propagation: str = "dense"

    def __post_init__(self) -> None:
        pick(dict.fromkeys(SCOPES), self.scope, "scope")
        pick(PROPAGATIONS, self.propagation, "propagation")
        if self.propagation == "sequential" and not self.may_be_sequential:
            raise ScoreError(
                f"recipe {self.name!r} can't be sequential: it takes one shot, and a score of what comes into consumers, such as "
                "importance.Activation or OptimalBrain with batches"
            )

    @property
    def may_be_sequential(self) -> bool:
        """Does it take one shot, by scores of what comes into consumers?"""
        alone = self.schedule is None and self.prepare is None
        return alone and isinstance(self.score, ByAxis) and not isinstance(self.score.data, Statistics)

    def plan(self, graph: DependencyGraph, target: Target, **options: Any) -> Plan:
        """The groups that go until `target` is met, in one shot; `options` are those of `graph.plan` and go before the recipe's.

        Where the recipe prepares a model, the plan is one for that: `plan.graph.model` is a changed copy.

        Raises: as `graph.plan` does, and as the score does.
        """
        require_graph(graph)
        return self._prepared(graph, target, options)

    def prune(self, graph: DependencyGraph, target: Target, **options: Any) -> Pruned:
        """Plan, cut a copy of the graph's model, check it, and let what stays make up for what went; in steps if it has some.

        In one shot, statistics of the score and of the compensation are gathered in one pass where both are from the same
        batches.

        Raises: as `graph.plan`, `plan.apply` and `importance.collect` do; the graph's model stays as it is in any case.
        """
        require_graph(graph)
        steps = self.schedule(_in_proportion(graph, target)) if callable(self.schedule) else self.schedule
        done = self._at_once(graph, target, options) if steps is None else self._in_steps(graph, target, options, steps)
        for step in self.afterwards:
            step(done.model)
        return done

    def reported(self, graph: DependencyGraph, target: Target, **options: Any) -> tuple[Plan, CutReport]:
        """As `prune`, the plan and the report of the cut, which says what made up for that.

        Raises PlanError where the recipe prunes in steps, which have a report each.
        """
        if self.schedule is not None:
            raise PlanError(
                f"recipe {self.name!r} prunes in steps, which have no plan in common: take `depgraph prune --recipe {self.name}` on the "
                f"PyTorch model, or importance.recipes.{self.name}(...).prune from Python"
            )
        done = self.prune(graph, target, **options)
        assert done.plan is not None and done.report is not None
        made = () if done.compensated is None else (str(done.compensated),)
        return done.plan, replace(done.report, notes=(*done.report.notes, *made))

    def _at_once(self, graph: DependencyGraph, target: Target, options: dict[str, Any]) -> Pruned:
        if self.prepare is not None:
            plan = self._prepared(graph, target, options)
            found = self._statistics(plan.graph)
        elif self.propagation == "sequential":
            plan, found = self._in_sequence(graph, target, options)
        else:
            found, score = self._statistics(graph), self.score
            if found is not None and getattr(score, "data", None) is self.batches:
                score = replace(score, data=found)  # type: ignore[type-var]
            plan = self._planned(graph, score, target, options)
        report = plan.apply_with_report(form=options.get("form", "auto"))
        done = None
        if self.compensation is not None and self.batches is not None:
            done = self._made_up(report.model, plan, found)
        return Pruned(report.model, plan, report, done)

    def _in_steps(self, graph: DependencyGraph, target: Target, options: dict[str, Any], steps: Schedule) -> Pruned:
        made: list[Compensated] = []

        def make_up(plan: Plan, report: CutReport) -> None:
            if self.compensation is not None and self.batches is not None:
                made.append(self._made_up(report.model, plan, None))
            if steps.after_cut is not None:
                steps.after_cut(plan, report)

        spread: Any = self._spread(self.score)
        found = replace(steps, after_cut=make_up).apply(graph, spread, target, **self._options(graph, options))
        return Pruned(found.model, found.plan, None, Compensated.joined(made) if made else None, found)

    def _made_up(self, model: nn.Module, plan: Plan, found: Statistics | None) -> Compensated:
        """Let what stays make up for what went, with statistics that were found or of the recipe's batches."""
        assert self.compensation is not None and self.batches is not None
        if self.compensation.inputs == "pruned":
            return refit(model, plan, self.batches, self.compensation)
        data = self.batches if found is None else found
        return compensate(model, plan, data, self.compensation, self._gathering(plan.graph))

    def _spread(self, score: Scorer | Scores | None) -> Scorer | Scores:
        if score is None:
            raise ScoreError(f"the recipe {self.name!r} has neither a score nor a step that prepares one")
        return score if self.allocation is None else Allocated(score, self.allocation)

    def _options(self, graph: DependencyGraph, options: dict[str, Any]) -> dict[str, Any]:
        scope = self.scope if self.allocation is None else "global"
        own: dict[str, Any] = {"scope": scope}
        if "only" not in options:
            own["only"] = tuple(units(graph, self.units))
        if self.protect is not None and "protect" not in options:
            own["protect"] = self.protect(graph)
        return own | options

    def _prepared(self, graph: DependencyGraph, target: Target, options: dict[str, Any]) -> Plan:
        """A plan, of the model that was prepared for it where the recipe does that."""
        if self.propagation == "sequential":
            return self._in_sequence(graph, target, options)[0]
        if self.prepare is None:
            return self._planned(graph, self.score, target, options)
        prepared = self.prepare(graph)
        options = {"only": prepared.axes, **options}
        with in_words_of(target, graph.dense_cost):
            plan = self._planned(prepared.graph, prepared.scores, _in_terms_of(prepared.graph, graph, target), options)
        prepared.settle(plan)
        return replace(plan, notes=(*plan.notes, *prepared.notes))

    def _in_sequence(self, graph: DependencyGraph, target: Target, options: dict[str, Any]) -> tuple[Plan, Statistics]:
        """A plan by scores taken one consumer after the other, and the statistics that they are from."""
        spread, given = self._spread(self.score), self._options(graph, options)
        dense = checked_scores(graph, spread)
        first = graph.plan(Known(dense, spread), target, **given)
        assert isinstance(self.score, ByAxis)
        found = sequential(first, self.score, self.compensation, self._gathering(graph))
        anew = Known(reordered(graph, dense, found.scores), spread)
        return graph.plan(anew, target, **given), found.statistics

    def _planned(
        self, graph: DependencyGraph, score: Scorer | Scores | None, target: Target, options: dict[str, Any]
    ) -> Plan:
        return graph.plan(self._spread(score), target, **self._options(graph, options))

    def _statistics(self, graph: DependencyGraph) -> Statistics | None:
        """What the compensation needs and, from the same batches, the score; None where that is nothing."""
        if self.compensation is None or self.batches is None:
            return None
        fitted = self.compensation.inputs == "pruned"  # which looks at the batches itself
        needs = [] if fitted else list(self.compensation.needs)
        if getattr(self.score, "data", None) is self.batches:
            needs += getattr(self.score, "needs", ())
        if not needs:
            return None
        return collect(graph, self.batches, needs, self._gathering(graph))  # type: ignore[arg-type]

    def _gathering(self, graph: DependencyGraph) -> Gathering:
        if self.gathering.axes is not None:
            return self.gathering
        return replace(self.gathering, axes=frozenset(a.name for a in graph.axes if a.prunable.any()))


def _in_proportion(graph: DependencyGraph, target: Target) -> Target:
    """A target as shares of the dense model, for what says how many steps it takes: milliseconds as if they went with MACs."""
    shares = shares_of(graph, target)
    timed = shares.pop(LATENCY, None)
    return Target(**(shares if timed is None else shares | {"macs": min(timed, shares.get("macs", timed))}))  # type: ignore[arg-type]


def _in_terms_of(prepared: DependencyGraph, dense: DependencyGraph, target: Target) -> Target:
    """A target for a model that may have become larger, whose shares are of the dense one."""
    now, was = prepared.dense_cost, dense.dense_cost
    target = target.in_shares(was)
    return Target(**{m: share * min(1.0, getattr(was, m) / getattr(now, m)) for m, share in target.shares.items()})
