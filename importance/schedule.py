"""Pruning in steps: each cuts the model that the last one left, scored anew, down to its part of the budget in exact cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

import depgraph
from depgraph import Axis, Cost, DependencyGraph, Plan, Target
from depgraph.cutting.report import Check, CutReport
from depgraph.cutting.rerunning import Inputs, inputs_at
from depgraph.errors import DepgraphError, NothingToPrune, PlanError, ScoreError, TargetError
from depgraph.options import Options, Pattern, matches
from depgraph.scoring import Scorer
from importance.choices import pick
from importance.earlier import followed

Curve = Callable[[float, float], float]
"""Maps how far the steps have come, in (0, 1], and the share that is to go in the end, to the share that is gone by then."""


def linear(progress: float, final: float) -> float:
    """As much in every step."""
    return final * progress


def cubic(progress: float, final: float) -> float:
    """Much in the first steps, little in the last (Zhu & Gupta 2017, METHODS.md 2.22)."""
    return final * (1 - (1 - progress) ** 3)


def geometric(progress: float, final: float) -> float:
    """The same share of what is left in every step, as iterative magnitude pruning does."""
    return float(1 - (1 - final) ** progress)


CURVES: dict[str, Curve] = {"cubic": cubic, "linear": linear, "geometric": geometric}


@dataclass(frozen=True)
class Step:
    """One step that is done: which of how many, and what the model costs now.

    `keep` has the share of the dense cost that the step was to keep, by metric. `check` is None where nothing was cut, as
    the step before had met that already, or no check was wanted.
    """

    number: int
    steps: int
    keep: dict[str, float]
    cost: Cost
    check: Check | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"step {self.number} of {self.steps}"


@dataclass(frozen=True)
class Scheduled:
    """The pruned model, what it cost before, and its steps."""

    model: nn.Module = field(repr=False)
    before: Cost
    steps: tuple[Step, ...]

    @property
    def after(self) -> Cost:
        return self.steps[-1].cost

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            shares = step.cost.share_of(self.before)
            parts = ", ".join(f"{m}={shares[m]:.4f} (at most {share:.4f})" for m, share in step.keep.items())
            lines += [f"{step}: {parts}", *(f"  {note}" for note in step.notes)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Schedule:
    """How many steps, how much by each, and what happens after each.

    After every step the smaller model is traced and scored anew. The last step meets the target exactly, as one step would,
    and one step is one-shot pruning.

    Args:
        steps: how many, 1 or more.
        curve: a name of `CURVES`, or a function (progress, final) -> share gone, which rises to `final` at progress 1.
        after_step: called with the model and the `Step` after each, the last one too: to train, or to measure. It may change
            the weights, but not their shapes.
        progress: "bar" shows one on stderr, "none" doesn't.
        after_cut: called before that with the plan and the report of each cut, as long as the model before it is still there
            (`plan.graph.model`): to let what stays make up for what went. It may change weights of `report.model` and add
            biases, which the next step's cost counts.

    Raises PlanError for an option out of range.
    """

    steps: int = 1
    curve: str | Curve = "cubic"
    after_step: Callable[[nn.Module, Step], Any] | None = None
    progress: str = "none"
    after_cut: Callable[[Plan, CutReport], Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PlanError(f"a schedule has steps={self.steps!r}: give a whole number, 1 or more")
        for name, takes in (("after_step", "the model and the step"), ("after_cut", "the plan and the report")):
            called = getattr(self, name)
            if called is not None and not callable(called):
                raise PlanError(f"{name}={called!r} can't be called: give a function of {takes}")
        if self.progress not in ("none", "bar"):
            raise PlanError(f"progress={self.progress!r} of a schedule is neither 'none' nor 'bar'")
        self._curve()

    def _curve(self) -> Curve:
        return self.curve if callable(self.curve) else pick(CURVES, self.curve, "curve of a schedule")

    def gone(self, final: float) -> list[float]:
        """The share that is gone after each step [steps], of which the last is `final`.

        Raises PlanError where the curve falls, leaves 0 to 1, or doesn't end in `final`.
        """
        curve = self._curve()
        found = [float(curve((k + 1) / self.steps, final)) for k in range(self.steps)]
        if not np.isclose(found[-1], final, rtol=0, atol=1e-9):
            raise PlanError(
                f"the curve of a schedule ends in {found[-1]!r}: at progress 1 it must give what it is given, {final!r}"
            )
        if any(not 0 <= a <= b <= 1 for a, b in zip([0.0, *found], found, strict=False)):
            raise PlanError(f"the curve of a schedule gives {found}: what is gone must rise from 0, and never fall")
        return [*found[:-1], final]

    def apply(self, graph: DependencyGraph, scorer: Scorer, target: Target, **options: Any) -> Scheduled:
        """Prune a copy of the graph's model in steps; the model itself stays as it is, also after an error.

        Args:
            graph: of the model as it is; `target` is a share of its cost.
            scorer: an estimator, called with the graph of every step.
            options: those of `graph.plan`; `protect` and `only` mean axes of this graph, `floor` shares of their groups here.
                `form`, and `check` of `plan.apply`, hold for every cut.

        Raises what `depgraph.trace`, `graph.plan` and `plan.apply` raise, with the step and what was reached; ScoreError for
        scores by axis, which can't be taken anew, with more than one step.
        """
        if self.steps > 1 and not callable(scorer):
            raise ScoreError(
                f"{self.steps} steps need a scorer, which is called in each: scores by axis fit one step only"
            )
        run = _Run(graph, scorer, target, options, self.after_cut)
        target = target.in_shares(graph.dense_cost)
        for number, keep in enumerate(self._shown(target), start=1):
            with run.named(number, self.steps):
                step = run.step(Step(number, self.steps, keep, graph.dense_cost))
            if self.after_step is not None:
                self.after_step(run.model, step)
        return Scheduled(run.model, graph.dense_cost, tuple(run.steps))

    def _shown(self, target: Target) -> Iterable[dict[str, float]]:
        """What every step keeps, by metric, with a bar if asked for."""
        gone = {metric: self.gone(1 - share) for metric, share in target.shares.items()}
        keep = [{metric: 1 - each[k] for metric, each in gone.items()} for k in range(self.steps - 1)]
        keep.append(dict(target.shares))
        if self.progress == "none":
            return keep
        from rich.console import Console
        from rich.progress import track

        return track(keep, "pruning in steps", console=Console(stderr=True), transient=True)


@dataclass(frozen=True)
class Pace:
    """A schedule for any target: as many steps as it takes to lose at most `share` of the dense cost in each.

    Raises PlanError for a share that isn't above 0 and at most 1.
    """

    share: float = 0.05
    curve: str | Curve = "linear"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PlanError(f"a pace has share={self.share!r}: give a number above 0 and up to 1")

    def __call__(self, target: Target, /) -> Schedule:
        gone = max(1 - share for share in target.shares.values())
        return Schedule(max(1, math.ceil(gone / self.share - 1e-9)), self.curve)


@dataclass(frozen=True)
class _Cut:
    """What the next step has to know of a cut, without the model before it: groups left, and how to trace the model again."""

    left: dict[str, int]
    inputs: Inputs
    free: frozenset[str]
    fixed: frozenset[str]
    params: int

    @classmethod
    def of(cls, plan: Plan, added: int) -> _Cut:
        """After a cut that so many parameters were added to."""
        graph = plan.graph
        left = {axis.name: axis.size - len(plan.removal.get(axis.name, ())) for axis in graph.axes}
        fixed = frozenset(graph.capture.program.by_products) - graph.free
        return cls(left, inputs_at(graph, plan.kept()), graph.free, fixed, plan.cost().params + added)

    def again(self, model: nn.Module) -> DependencyGraph:
        """The graph of the cut model, with the same outputs free.

        Raises PlanError where what was called after a step has changed shapes.
        """
        graph = depgraph.trace(model, *self.inputs, free=self.free, fixed=self.fixed)
        if graph.dense_cost.params != self.params:
            raise PlanError(
                f"the model has {graph.dense_cost.params:,} parameters, the step before left {self.params:,}: "
                "what is called after a step may change weights, not their shapes"
            )
        return graph


class _Run:
    """The state between steps: the model as far as it is cut, and either its graph or the cut that it comes from."""

    def __init__(
        self,
        graph: DependencyGraph,
        scorer: Scorer,
        target: Target,
        options: dict[str, Any],
        after_cut: Callable[[Plan, CutReport], Any] | None,
    ) -> None:
        if not isinstance(target, Target):
            raise TargetError(f"expected a Target such as depgraph.Target(params=0.7), got {target!r}")
        if graph.words is not None:
            raise PlanError("a graph with an open vocabulary can't be pruned in steps: trim it before or after")
        self.dense = graph.dense_cost
        self.state: DependencyGraph | _Cut = graph
        self.scorer = scorer
        self.after_cut = after_cut
        self.options = _Kept(graph, {name: value for name, value in options.items() if name != "check"})
        self.applying = {name: value for name, value in options.items() if name in ("form", "check")}
        self.model = graph.model
        self.steps: list[Step] = []

    @contextmanager
    def named(self, number: int, steps: int) -> Iterator[None]:
        """Errors say in which step they came, and what the steps before had reached."""
        try:
            yield
        except DepgraphError as error:
            if steps == 1:
                raise
            shares = (self.steps[-1].cost if self.steps else self.dense).share_of(self.dense)
            reached = ", ".join(f"{metric}={share:.3f}" for metric, share in shares.items())
            kind = TargetError if self.steps and isinstance(error, NothingToPrune) else type(error)
            raise kind(f"step {number} of {steps}, from a model with {reached}: {error}") from error

    def step(self, wanted: Step) -> Step:
        """Cut the model to what a step keeps, where it isn't that small yet; the first step makes it a copy in any case."""
        graph = self._graph()
        target = _remaining(wanted.keep, self.dense, graph.dense_cost)
        done = replace(wanted, cost=graph.dense_cost)
        if target is not None or not self.steps:
            plan = graph.plan(self.scorer, target, **self.options.on(graph)) if target else graph.cut_plan({})
            report = plan.apply_with_report(**self.applying)
            before = _size(report.model)
            if self.after_cut is not None:
                self.after_cut(plan, report)
            self.model, self.state = report.model, _Cut.of(plan, _size(report.model) - before)
            done = replace(wanted, cost=report.after, check=report.check, notes=(*plan.notes, *report.notes))
        self.steps.append(done)
        return done

    def _graph(self) -> DependencyGraph:
        if isinstance(self.state, _Cut):
            graph = self.state.again(self.model)
            self.options.follow(self.state.left, graph)
            self.state = graph
        return self.state


class _Kept:
    """Options of a plan as they hold for later graphs: axes that were named stay so, floors are shares of the first widths."""

    def __init__(self, graph: DependencyGraph, given: dict[str, Any]) -> None:
        self.given = given
        self.options = Options.of(given)
        self.options.check_patterns(graph)
        self.first = {axis.name: axis for axis in graph.axes}
        self.now = {name: name for name in self.first}

    def follow(self, left: dict[str, int], graph: DependencyGraph) -> None:
        """From now on `graph` is the current one; of the axes of that before, the cut has left so many groups."""
        names = followed(left, graph.axes)
        self.now = {new: self.now[old] for new, old in names.items() if old in self.now}

    def on(self, graph: DependencyGraph) -> dict[str, Any]:
        """The options for the current graph."""
        named = {name: self._named(getattr(self.options, name)) for name in ("protect", "only") if name in self.given}
        stay = {new: self.options.floor_of(self.first[old]) * self.first[old].size for new, old in self.now.items()}
        return (
            self.given
            | named
            | {"floor": {n: min(groups / graph[n].size, 1.0) for n, groups in stay.items() if groups}}
        )

    def _named(self, patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
        def is_named(axis: Axis) -> bool:
            return matches(self.first.get(self.now.get(axis.name, ""), axis), patterns)

        return (is_named,) if patterns else ()


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _remaining(keep: dict[str, float], dense: Cost, now: Cost) -> Target | None:
    """The shares of a model's cost now that meet shares of its dense cost; None where it does."""
    shares: dict[str, Any] = {}
    for metric, share in keep.items():
        most, cost = share * getattr(dense, metric), getattr(now, metric)
        if cost > most:
            shares[metric] = share if cost == getattr(dense, metric) else (math.floor(most) + 0.5) / cost
    return Target(**shares) if shares else None
