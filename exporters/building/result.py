"""A build from beginning to end, and what it gives back."""

from __future__ import annotations

import datetime
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import depgraph
from depgraph.errors import DepgraphError
from depgraph.storage import appearing, free_folder
from depgraph.story import Story, TradeOff, Trial
from depgraph.story.parts import Sensitivity
from exporters.building.asked import Budget, Subject, Ways
from exporters.building.folder import Told, making_of, write_result
from exporters.building.pruning import Way
from exporters.building.search import Candidate, Search, Step
from importance.calling import each_tensor
from importance.sensitivity import Probing, sensitivity
from importance.sweeping import on_front

_NEAR = 0.02  # of the parameters: a point of the trade-off so near to the result isn't made


@dataclass(frozen=True)
class Built:
    """A folder that was made, what its report tells, and all that was tried on the way, the best first."""

    folder: Path
    story: Story
    tried: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """What the folder holds."""
        return self.tried[0]


def build(
    subject: Subject,
    budget: Budget,
    folder: str | Path,
    ways: Ways | None = None,
    *,
    step: Step | None = None,
    command: str = "",
) -> Built:
    """Make a model keep within a budget, and leave a folder that runs with a report beside it.

    Every recipe in every precision is pruned until what was measured (or, with the profile of a device, what that predicts) keeps
    within the budget; of these the one with the best quality is written: `model.onnx` with `run.py`, for language models a folder
    for onnxruntime-genai or one of an encoder and a decoder, the model for PyTorch, the plan, `report.html` and `report.json`.

    Args:
        folder: must not exist, or be empty; it appears whole or not at all.
        step: gives a context for every step, by what is being done in it.
        command: to be named in the report as what made it.

    Raises:
        TargetError: nothing keeps within the budget; what came nearest, and what holds it.
        CheckpointError: the folder exists already or can't be written.
        ExportError, CaptureError, DataError, ScoreError: as exporting, tracing and scoring do.
    """
    path = free_folder(folder, "never")
    with tempfile.TemporaryDirectory() as work, appearing(path) as draft:
        given = Ways() if ways is None else ways
        search = Search(subject, budget, given, Path(work), step=step or (lambda what: nullcontext()))
        tried = search.candidates()
        best = tried[0]
        told = Told(making_of(search, best, command, datetime.date.today().isoformat()))
        told.tradeoff = _trade_off(search, tried, told)
        told.sensitivity = _sensitivity(search, told)
        story = write_result(search, best, draft, told)
    return Built(path, story, tuple(tried))


def _trade_off(search: Search, tried: list[Candidate], told: Told) -> TradeOff:
    """Quality against parameters: what was tried, and the best's recipe at other shares."""
    graph, figure, best = search.graph, search.subject.figure, tried[0]
    points: list[tuple[str, float, float]] = []
    for one in tried:
        cost = graph.dense_cost if one.report is None else one.report.after
        said = one.recipe if one.precision == "float32" else f"{one.recipe}, {one.precision}"
        points.append((said, cost.params / graph.dense_cost.params, one.quality))
    way = best.way if best.report is not None else Way(search.ways.recipes[0])
    for share in search.ways.shares:
        if all(abs(share - there) > _NEAR for _, there, _ in points):
            points += [point for point in _point(search, way, share, told) if point not in points]
    fronts = on_front([(share, quality) for _, share, quality in points], figure.higher_is_better)
    trials = tuple(Trial(n, s, q, front) for (n, s, q), front in zip(points, fronts, strict=True))
    return TradeOff("params", figure.name, trials, figure.higher_is_better, search.dense_quality, 0)


def _point(search: Search, way: Way, share: float, told: Told) -> list[tuple[str, float, float]]:
    subject, target = search.subject, depgraph.Target(params=share)
    try:
        with search.step(f"{way} at {share:.0%} of the parameters"):
            report = search.pruner.pruned(way, target).report
            return [(str(way), report.after.params / report.before.params, subject.measure(report.model))]
    except DepgraphError as error:
        told.notes.append(f"{way} at {share:.0%} of the parameters: {error}")
        return []


def _sensitivity(search: Search, told: Told) -> Sensitivity | None:
    """What single axes do to the loss, or to how far outputs move; None, and a note, where neither can be had."""
    rows = max((len(array) for array in search.example.values() if array.ndim), default=1)
    batches = [_rows(batch, rows) for batch in islice(search.subject.batches or (), 4)]
    if not batches or not search.ways.probes:
        return None
    probing = Probing(shares=(0.25, 0.5), most=search.ways.probes)
    loss, called = search.source.loss(search.graph)
    try:
        with search.step("probing single axes"):
            return replace(sensitivity(search.graph, batches, loss, probing), figure=called)
    except DepgraphError as error:
        told.notes.append(f"no sensitivities: {error}")
        return None


def _rows(batch: Any, count: int) -> Any:
    """The first rows of a batch, as many as the example has: another number may take another way through the code."""
    return each_tensor(batch, lambda tensor: tensor[:count] if tensor.ndim else tensor)
