"""The search: every recipe in every precision is pruned to what the budget allows, exported, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import depgraph
from depgraph.cutting.report import CutReport
from depgraph.dependency import DependencyGraph
from depgraph.errors import DepgraphError, ExportError, NothingToPrune, TargetError
from depgraph.options import Options
from depgraph.plan import Plan
from depgraph.scoring import Scores
from exporters.building.asked import Budget, Subject, Ways
from exporters.building.file_model import FileModel
from exporters.building.limits import Limits
from exporters.building.precisions import Precision, calibration, file_bytes, made, measured_precision, side_by_side
from exporters.calls import flatten_call
from exporters.feeds import Feeds
from exporters.onnx_export import OnnxOptions, to_onnx
from exporters.timing.model import MeasuredLatency
from importance import named, recipes
from importance.recipe import Recipe
from importance.remembered import Remembered, remembering

Step = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Candidate:
    """One way through, as far as it came: `file` is what was measured, `why` says what stands against it, empty for nothing.

    times: milliseconds of the dense float32 file and of this one, in turns. predicted: their ratio by the latency model.
    quality: of the file; where that couldn't be run in the model's place, of the float32 model, and `of_file` is false.
    plan: None where the dense model keeps within the budget.
    """

    recipe: str
    precision: str
    model: nn.Module
    plan: Plan | None
    report: CutReport | None
    file: Path
    bytes: int
    times: tuple[float, float]
    predicted: float | None
    quality: float
    rounds: int
    of_file: bool = True
    why: str = ""

    @property
    def ratio(self) -> float:
        """The share of the dense float32 file's time that it takes."""
        return self.times[1] / self.times[0]


@dataclass
class Search:
    """Searches for `subject` within `budget`; files go to `work`, `step` says what is being done."""

    subject: Subject
    budget: Budget
    ways: Ways
    work: Path
    step: Step = field(default=lambda what: nullcontext())
    notes: list[str] = field(default_factory=list)
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _scorers: dict[str, Remembered] = field(default_factory=dict)

    @cached_property
    def graph(self) -> DependencyGraph:
        """The traced model."""
        with self.step("tracing"):
            return depgraph.trace(self.subject.model, self.subject.args, self.subject.kwargs)

    @cached_property
    def latency(self) -> MeasuredLatency | None:
        """How long what widths take, on the device of the profile or here; None where the budget doesn't limit it."""
        if self.budget.latency_ms is None:
            return None
        with self.step("measuring operators"):
            found = MeasuredLatency.of(self.graph, self.budget.profile, threads=self.budget.threads)
        self.notes += found.notes
        if self.budget.profile is not None and (other := self.budget.profile.here()):
            self.notes.append(
                f"predicted times are those of the profile, measured ones of this machine: the profile {other}"
            )
        return found

    @cached_property
    def dense(self) -> Path:
        """The file of the model as it is, in float32."""
        with self.step("exporting the dense model"):
            return self._exported(self.subject.model, self.work / "dense" / "model.onnx")

    @cached_property
    def dense_quality(self) -> float:
        """The figure of quality of the model as it is."""
        with self.step("measuring the dense model's quality"):
            return self.subject.measure(self.subject.model)

    @cached_property
    def example(self) -> Feeds:
        """The example inputs by the names of a file's inputs."""
        call = flatten_call(self.subject.model, self.subject.args, self.subject.kwargs)
        return {name: tensor.detach().cpu().numpy() for name, tensor in zip(call.names, call.tensors, strict=True)}

    @cached_property
    def data(self) -> list[Feeds]:
        """Batches to calibrate and compare quantised files with."""
        return calibration(self.subject.batches, list(self.example), self.example)

    def candidates(self) -> list[Candidate]:
        """All that was made, the best within the budget first.

        Raises TargetError where nothing keeps within it, with what came nearest or why nothing came near; ExportError where the
        dense model can't be exported, or a file can't be written.
        """
        found: list[Candidate] = []
        refused: list[DepgraphError] = []
        _ = self.dense  # what can't be exported as it is can't be built
        for precision in self._precisions(refused):
            for recipe in self.ways.recipes:
                try:
                    found.append(self._candidate(recipe, precision))
                except (TargetError, NothingToPrune, ExportError) as error:
                    _raise_trouble(error)
                    refused.append(error)
                    self.notes.append(f"{recipe} in {precision.name}: {error}")
                    continue
                if found[-1].plan is None:  # no recipe has anything to do
                    break
        fitting = [one for one in found if not one.why]
        if not fitting:
            raise self._unmet(found, refused)
        return sorted(found, key=self._order)

    def _order(self, one: Candidate) -> tuple[bool, float, int]:
        worth = one.quality if self.subject.figure.higher_is_better else -one.quality
        return bool(one.why), -worth if math.isfinite(worth) else math.inf, one.bytes

    def _precisions(self, refused: list[DepgraphError]) -> list[Precision]:
        found = []
        for name in self.ways.precisions:
            with self.step(f"trying {name}"):
                try:
                    weights = self.graph.dense_cost.bytes
                    found.append(measured_precision(name, self.dense, weights, self.budget, self.data))
                except ExportError as error:
                    _raise_trouble(error)
                    refused.append(error)
                    self.notes.append(f"{name} was left out: {error}")
        return found

    def _candidate(self, recipe: str, precision: Precision) -> Candidate:
        """What a recipe makes in a precision, made anew while it measures above the budget."""
        limits = Limits.of(self.budget, precision)
        for number in range(1, self.ways.rounds + 1):
            found = self._once(recipe, precision, limits, number)
            if not found.why or found.report is None or number == self.ways.rounds:
                return found
            size, time = self._over(found)
            weights = found.report.after.bytes
            fewer = precision.fewer_weights(self.budget.bytes, found.bytes, weights) if self.budget.bytes else 0
            limits = limits.tighter(time, fewer if size > 1 else None)
        raise AssertionError("unreachable")

    def _once(self, recipe: str, precision: Precision, limits: Limits, number: int) -> Candidate:
        name = f"{recipe}-{precision.name}-{number}"
        with self.step(f"{recipe}, {precision.name}: pruning"):
            plan, report = (
                (None, None)
                if limits.met(self.graph, self.latency)
                else self.pruned(recipe, limits.target(self.latency))
            )
            model = self.subject.model if report is None else report.model
        with self.step(f"{recipe}, {precision.name}: exporting"):
            float32 = (
                self.dense if report is None else self._exported(model, self.work / name / "float32" / "model.onnx")
            )
            file = made(precision.name, float32, self.work / name / "model.onnx", self.data)
        with self.step(f"{recipe}, {precision.name}: measuring"):
            times = side_by_side({"dense": self.dense, "made": file}, self.example, self.budget.threads)
            quality, of_file = self._quality(model, file, precision)
        found = Candidate(
            recipe if plan is not None else "dense",
            precision.name,
            model,
            plan,
            report,
            file,
            file_bytes(file),
            (times["dense"], times["made"]),
            self._predicted(plan, precision),
            quality,
            number,
            of_file,
        )
        return _with_why(found, self._over(found), self.budget)

    def pruned(self, name: str, target: depgraph.Target) -> tuple[Plan, CutReport]:
        """What a recipe, or a score, makes of the model; a recipe takes every axis where those that it is for aren't enough."""
        if name in recipes.RECIPES:
            recipe = self._recipe(name)
            given = {k: v for k, v in self.ways.options.items() if v != getattr(Options(), k)}
            try:
                return recipe.reported(self.graph, target, **given)
            except (NothingToPrune, TargetError) as error:
                if "only" in given:
                    raise
                said = f"{name} takes axes of all kinds, as those that it is for aren't enough"
                self.notes += [] if any(note.startswith(said) for note in self.notes) else [f"{said}: {error}"]
                return replace(recipe, units="all").reported(self.graph, target, **given)
        plan = self.graph.plan(self._scorer(name), target, **self.ways.options)
        return plan, plan.apply_with_report(form=self.ways.options.get("form", "auto"))

    def _recipe(self, name: str) -> Recipe:
        """The recipe of that name, which scores the model once however often it is asked."""
        if name not in self._recipes:
            made = recipes.named(name, self.subject.batches, self.subject.loss, self.ways.seed)
            self._recipes[name] = remembering(made)
        return self._recipes[name]

    def _scorer(self, name: str) -> Remembered:
        if name not in self._scorers:
            subject = self.subject
            made = named(name, batches=subject.batches, loss=subject.loss, seed=self.ways.seed)
            self._scorers[name] = Remembered(made)
        return self._scorers[name]

    def scores_of(self, found: Candidate) -> Scores | None:
        """The scores that a candidate's plan was made by; of several that a recipe tried, those that explain it best."""
        if found.plan is None:
            return None
        if found.recipe not in self._recipes:
            return self._scorer(found.recipe)(self.graph)
        recipe = self._recipes[found.recipe]
        tried = [one.score for one in getattr(recipe, "rivals", (recipe,)) if isinstance(one.score, Remembered)]
        said = [score(self.graph) for score in tried if found.plan.graph is self.graph]
        return min(said, key=lambda scores: _surprises(scores, found.plan), default=None)  # type: ignore[arg-type]

    def _exported(self, model: nn.Module, path: Path) -> Path:
        options = OnnxOptions(opset=self.ways.opset, dtype="float32")
        path.parent.mkdir(parents=True, exist_ok=True)
        to_onnx(model, self.subject.args, path, self.subject.kwargs, options=options)
        return path

    def _quality(self, model: nn.Module, file: Path, precision: Precision) -> tuple[float, bool]:
        """Quality, and whether it is the file's: a float32 file computes what the model does, others are asked if they can be."""
        if precision.name != "float32":
            try:
                return self.subject.measure(FileModel(file, self.subject.model, self.budget.threads)), True
            except Exception as error:
                self.notes.append(
                    f"quality is that of the float32 model, as the {precision.name} file couldn't be run in its place ({error})"
                )
        return self.subject.measure(model), precision.name == "float32"

    def _predicted(self, plan: Plan | None, precision: Precision) -> float | None:
        if self.latency is None:
            return None
        share = 1.0 if plan is None else self.latency.ms(plan.kept()) / self.latency.ms(self.graph.widths.at({}))
        return share * precision.share

    def _over(self, found: Candidate) -> tuple[float, float]:
        """How many times the bytes, and the milliseconds, that are allowed; times are as measured, or a profile predicts."""
        size = found.bytes / self.budget.bytes if self.budget.bytes else 0.0
        if self.latency is None or self.budget.latency_ms is None:
            return size, 0.0
        share = found.ratio if self.budget.profile is None else (found.predicted or 0.0)
        return size, share * self.latency.dense_ms / self.budget.latency_ms

    def _unmet(self, found: list[Candidate], refused: list[DepgraphError]) -> TargetError:
        if not found:
            first = refused[0] if refused else "no precision is left to try"
            return TargetError(f"nothing keeps within {self.budget}: {first}")
        nearest = min(found, key=lambda one: max(self._over(one)))
        return TargetError(
            f"nothing keeps within {self.budget}; nearest came {nearest.recipe} in {nearest.precision}, which {nearest.why}: raise the "
            "budget, allow other precisions, or lift floors and protections"
        )


def _raise_trouble(error: DepgraphError) -> None:
    """Raise an error that files made, such as a full disk: it says nothing of the way that was tried."""
    if isinstance(error.__cause__, OSError):
        raise error


def _surprises(scores: Scores, plan: Plan) -> int:
    """How many groups went though others of their axis, which could go too, score lower and stay."""
    count = 0
    for name, gone in plan.removal.items():
        values = np.asarray(scores[name])
        stays = np.setdiff1d(np.flatnonzero(plan.graph[name].prunable), gone)
        count += int((values[list(gone)] > values[stays].min()).sum()) if len(stays) else 0
    return count


def _with_why(found: Candidate, over: tuple[float, float], budget: Budget) -> Candidate:
    size, time = over
    said = [f"takes {found.bytes:,} bytes of {budget.bytes:,}"] if size > 1 else []
    said += [f"takes {time:.2f} times the milliseconds"] if time > 1 else []
    return Candidate(**{**vars(found), "why": " and ".join(said)})


__all__ = ["Candidate", "Search", "Step"]
