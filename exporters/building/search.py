"""The search: every recipe in every precision is pruned to what the budget allows, exported, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from depgraph.dependency import DependencyGraph
from depgraph.errors import DepgraphError, ExportError, NothingToPrune, ScoreError, TargetError
from depgraph.unmet import LATENCY, sized
from exporters.building.asked import BOTH, Budget, Subject, Ways
from exporters.building.candidate import Candidate, is_done
from exporters.building.generating import Generated, generated
from exporters.building.limits import Limits
from exporters.building.precisions import Precision, calibration, file_bytes, made, measured_precision, side_by_side
from exporters.building.predicting import Told, predicting
from exporters.building.pruning import Done, Pruner, Way
from exporters.building.sources import Source, source_of
from exporters.feeds import Feeds
from exporters.timing.model import MeasuredLatency

_MORE = 1.01  # of what files that generate took more than that of one run, so that another round ends below
Step = Callable[[str], AbstractContextManager[Any]]


@dataclass
class Search:
    """Searches for `subject` within what is `asked`; files go to `work`, `step` says what is being done."""

    subject: Subject
    asked: Budget
    ways: Ways
    work: Path
    step: Step = field(default=lambda what: nullcontext())
    notes: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)
    _generated: dict[Path, Generated | None] = field(default_factory=dict)

    @cached_property
    def graph(self) -> DependencyGraph:
        """The traced model."""
        with self.step("tracing"):
            return self.source.traced()

    @cached_property
    def source(self) -> Source:
        """How the model is traced, written and scored."""
        return source_of(self.subject, self.ways)

    @cached_property
    def pruner(self) -> Pruner:
        """What prunes it."""
        return Pruner(self.graph, self.subject, self.ways, self.notes)

    @cached_property
    def latency(self) -> MeasuredLatency | None:
        """How long what widths take, on the device of the profile or here; None where that isn't limited, and slow to find out."""
        return predicting(self.graph, self.dense, self.example, self.asked, Told(self.step, self.notes))

    @cached_property
    def budget(self) -> Budget:
        """The limits as milliseconds and bytes."""
        dense_ms = self.latency.dense_ms if self.asked.timed and self.latency is not None else 0.0
        return self.asked.of(dense_ms, file_bytes(self.dense))

    @cached_property
    def beside(self) -> int:
        """Bytes that the dense model's files that generate take beyond those of one run; 0 without a limit or such files."""
        if self.budget.bytes is None:
            return 0
        with self.step("exporting what generates"):
            made = generated(self.subject.model, self.subject, self.work / "generates", ("float32", self.ways.opset))
        return max(made.bytes - file_bytes(self.dense), 0) if made is not None else 0

    @cached_property
    def dense(self) -> Path:
        """The file of the model as it is, in float32."""
        with self.step("exporting the dense model"):
            return self._exported(self.graph.model, self.work / "dense" / "model.onnx")

    @cached_property
    def dense_quality(self) -> float:
        """The figure of quality of the model as it is."""
        with self.step("measuring the dense model's quality"):
            return self.subject.measure(self.graph.model)

    @cached_property
    def example(self) -> Feeds:
        """The example inputs by the names of a file's inputs."""
        return self.source.example(self.graph)

    @property
    def sizes(self) -> str:
        """The shapes of the example inputs, such as "input_ids 2x16"."""
        shapes = {name: "x".join(map(str, array.shape)) for name, array in self.example.items()}
        return ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())

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
        precisions = {one.name: one for one in self._precisions(refused)}
        for precision in precisions.values():
            made = list[Candidate]()
            for way in self.pruner.all():
                if is_done(way, made):
                    break
                try:
                    made.append(self._candidate(way, precision))
                except (TargetError, NothingToPrune, ExportError, ScoreError) as error:
                    _raise_trouble(error, way)
                    said = _least(error, way, precision, self.budget)
                    refused.append(said)
                    self.notes.append(f"{way} in {precision.name}: {said}")
            found += made
        fitting = [one for one in found if not one.why]
        if not fitting:
            raise self._unmet(found, refused)
        return self._settled(sorted(found, key=self._order), precisions)

    def _settled(self, tried: list[Candidate], precisions: Mapping[str, Precision]) -> list[Candidate]:
        """The same where the best's files that generate keep within the bytes; else it is made anew, smaller, and ranked again."""
        most = self.budget.bytes
        for _ in range(self.ways.rounds if most is not None else 0):
            best, made = tried[0], self.generated(tried[0])
            if most is None or made is None or made.bytes <= most or best.report is None:
                break
            more = math.ceil((made.bytes - best.bytes) * _MORE)
            again = self._candidate(best.way, replace(precisions[best.precision], beside=more))
            if again.why or again.bytes >= best.bytes:
                break
            tried = sorted([again, *tried[1:]], key=self._order)
        return tried

    def generated(self, found: Candidate) -> Generated | None:
        """The files of a candidate that generate, made once; None where the model doesn't."""
        if found.file not in self._generated:
            with self.step("exporting what generates"):
                folder = self.work / f"generates-{len(self._generated)}"
                self._generated[found.file] = generated(
                    found.model, self.subject, folder, (found.precision, self.ways.opset)
                )
        return self._generated[found.file]

    def _order(self, one: Candidate) -> tuple[bool, bool, float, int]:
        """What keeps within the budget comes first, of these what was measured itself, of these the best."""
        worth = one.quality if self.subject.figure.higher_is_better else -one.quality
        return bool(one.why), not one.of_file, -worth if math.isfinite(worth) else math.inf, one.bytes

    def _precisions(self, refused: list[DepgraphError]) -> list[Precision]:
        found = []
        for name in self.ways.precisions:
            with self.step(f"trying {name}"):
                try:
                    weights = self.graph.dense_cost.bytes
                    one = measured_precision(name, self.dense, weights, self.budget, self.data)
                    found.append(replace(one, beside=self.beside))
                except ExportError as error:
                    _raise_trouble(error)
                    refused.append(error)
                    self.notes.append(f"{name} was left out: {error}")
        return found

    def _candidate(self, way: Way, precision: Precision) -> Candidate:
        """What a way makes in a precision, made anew while it measures above the budget; where that goes no further, the nearest."""
        limits, made = Limits.of(self.budget, precision), list[Candidate]()
        for number in range(1, self.ways.rounds + 1):
            try:
                made.append(self._once(way, precision, limits, number))
            except TargetError as error:
                if not made:
                    raise
                made += self._at_the_least(way, precision, limits.lifted(error.unmet), number)
                break
            found = made[-1]
            if not found.why or found.report is None:
                return found
            size, time = self._over(found)
            weights = found.report.after.bytes
            fewer = precision.fewer_weights(self.budget.bytes, found.bytes, weights) if self.budget.bytes else 0
            limits = limits.tighter(time, fewer if size > 1 else None)
        return min(made, key=lambda one: max(self._over(one)))

    def _at_the_least(self, way: Way, precision: Precision, limits: Limits | None, number: int) -> list[Candidate]:
        """What was refused, made with limits that can just be met, as files may measure below what was taken off for them."""
        try:
            return [self._once(way, precision, limits, number)] if limits is not None else []
        except TargetError:
            return []

    def _once(self, way: Way, precision: Precision, limits: Limits, number: int) -> Candidate:
        name = f"{next(self._numbers)}-{precision.name}"
        with self.step(f"{way}, {precision.name}: pruning"):
            met = limits.met(self.graph, self.latency)
            done = None if met else self.pruner.pruned(way, limits.target(self.latency))
            report = None if done is None else done.report
            model = self.graph.model if report is None else report.model
        with self.step(f"{way}, {precision.name}: exporting"):
            float32 = (
                self.dense if report is None else self._exported(model, self.work / name / "float32" / "model.onnx")
            )
            file = made(precision.name, float32, self.work / name / "model.onnx", self.data)
        with self.step(f"{way}, {precision.name}: measuring"):
            times = side_by_side({"dense": self.dense, "made": file}, self.example, self.budget.threads)
            quality, of_file = self._quality(model, file, precision)
        found = Candidate(
            way,
            precision.name,
            model,
            None if done is None else done.plan,
            report,
            file,
            file_bytes(file),
            (times["dense"], times["made"]),
            self._predicted(done, precision),
            quality,
            number,
            of_file,
            int(precision.beside),
            () if done is None else done.steps,
        )
        return self._judged(found)

    def _exported(self, model: Any, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.source.written(model, path)

    def _quality(self, model: Any, file: Path, precision: Precision) -> tuple[float, bool]:
        """Quality, and whether it is the file's: a float32 file computes what the model does, others are asked if they can be."""
        if precision.name != "float32":
            try:
                return self.subject.measure(self.source.stand_in(file, self.budget.threads)), True
            except Exception as error:
                self.notes.append(
                    f"quality is that of the float32 model, as the {precision.name} file couldn't be run in its place ({error})"
                )
        return self.subject.measure(model), precision.name == "float32"

    def _predicted(self, done: Done | None, precision: Precision) -> float | None:
        """The share of the dense float32 file's time by the latency model; None where that can't say."""
        if self.latency is None:
            return None
        if done is not None and done.plan is None:  # the last step knows, where time was limited
            share = done.steps[-1].latency
        else:
            kept = self.graph.widths.at({}) if done is None or done.plan is None else done.plan.kept()
            share = self.latency.ms(kept) / self.latency.ms(self.graph.widths.at({}))
        return None if share is None else share * precision.share

    def _over(self, found: Candidate) -> tuple[float, float]:
        """How many times the bytes, and the milliseconds, that are allowed; times are as measured, or a profile predicts."""
        size = (found.bytes + found.beside) / self.budget.bytes if self.budget.bytes else 0.0
        if self.latency is None or self.budget.latency_ms is None:
            return size, 0.0
        share = found.ratio if self.budget.profile is None else (found.predicted or 0.0)
        return size, share * self.latency.dense_ms / self.budget.latency_ms

    def _judged(self, found: Candidate) -> Candidate:
        """The same, with what stands against it."""
        size, time = self._over(found)
        beside = f", or {found.bytes + found.beside:,} with its cache," if found.beside else ""
        said = [f"takes {found.bytes:,} bytes{beside} of {self.budget.bytes:,}"] if size > 1 else []
        most = self.budget.latency_ms
        said += [f"takes {time * most:.4g} ms of {most:.4g}"] if most is not None and time > 1 else []
        return replace(found, why=" and ".join(said))

    def _unmet(self, found: list[Candidate], refused: list[DepgraphError]) -> TargetError:
        if not found:
            least = min(
                refused, key=lambda error: getattr(error, "above", math.inf), default="no precision is left to try"
            )
            return TargetError(f"nothing keeps within {self.budget.words}: {least}", getattr(least, "above", math.inf))
        nearest = min(found, key=lambda one: max(self._over(one)))
        held = (
            f" ({sized(nearest.report.after.bytes)} of weights were left)"
            if nearest.report and self.budget.bytes
            else ""
        )
        return TargetError(
            f"nothing keeps within {self.budget.words}; nearest came {nearest.recipe} in {nearest.precision}, which {nearest.why}{held}: "
            "raise the budget, allow other precisions, or lift floors and protections",
            max(self._over(nearest)),
        )


def _least(error: DepgraphError, way: Way, precision: Precision, budget: Budget) -> DepgraphError:
    """A refusal of a plan as one of the file: what that takes at the least, and what holds it; others as they are."""
    unmet = error.unmet if isinstance(error, TargetError) else None
    if unmet is None:
        return error
    said, above = list[str](), list[float]()
    if LATENCY in unmet.least and budget.latency_ms:
        ms = unmet.least[LATENCY] * precision.share
        said.append(f"{ms:.3g} ms")
        above.append(ms / budget.latency_ms)
    if "bytes" in unmet.least and budget.bytes:
        size = precision.file_bytes(unmet.least["bytes"])
        said.append(f"a file of {sized(size)} ({sized(precision.file_bytes(0))} without weights)")
        above.append(size / budget.bytes)
    told = f"{unmet.where}{unmet.allow} {' and '.join(said)} at the least, by {way} in {precision.name}{unmet.held}"
    return TargetError(told, max(above, default=math.inf), unmet)


def _raise_trouble(error: DepgraphError, way: Way | None = None) -> None:
    """Raise an error that says nothing of the way that was tried: of a full disk, or of scores that competing doesn't take."""
    competes = way is not None and way.depth == BOTH
    if isinstance(error.__cause__, OSError) or isinstance(error, ScoreError) and not competes:
        raise error


__all__ = ["Candidate", "Search", "Step"]
