"""Pruning in steps: each cuts the model that the last one left, scored anew, down to its part of the budget in exact cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from depgraph import Cost, DependencyGraph, Plan, Target
from depgraph.cutting.report import CutReport
from depgraph.errors import PlanError, ScoreError
from depgraph.scoring import Scorer
from importance.choices import pick
from importance.progress import shown
from importance.stepping import Run, Step

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
class Scheduled:
    """The pruned model, what it cost before, its steps, and one plan of the first graph for all of them, where that can be told."""

    model: nn.Module = field(repr=False)
    before: Cost
    steps: tuple[Step, ...]
    plan: Plan | None = field(default=None, repr=False)

    @property
    def after(self) -> Cost:
        return self.steps[-1].cost

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            shares = step.left(self.before)
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
            graph: of the model as it is; `target` is a share of its cost, or milliseconds by a latency model of this graph.
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
        run = Run(graph, scorer, target, options, self.after_cut)
        if self.steps > 1:
            run.require_reachable()
        paces = shown(self._paces(run.shares), "pruning in steps", self.progress != "none")
        for number, keep in enumerate(paces, start=1):
            with run.named(number, self.steps):
                step = run.step(Step(number, self.steps, keep, graph.dense_cost))
            if self.after_step is not None:
                self.after_step(run.model, step)
        return Scheduled(run.model, graph.dense_cost, tuple(run.steps), run.plan())

    def _paces(self, shares: dict[str, float]) -> list[dict[str, float]]:
        """What every step keeps, by measure."""
        gone = {measure: self.gone(1 - share) for measure, share in shares.items()}
        return [*({measure: 1 - each[k] for measure, each in gone.items()} for k in range(self.steps - 1)), shares]


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
