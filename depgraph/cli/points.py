"""The points of a sweep, made by name: the model is loaded and traced once in a process, and pruned for each."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import depgraph
from depgraph.cli.data import Amount, TextData, read_text, text_data
from depgraph.cli.models import Loaded, Loading, load_model
from depgraph.cli.options import check_patterns
from depgraph.cli.quality import Measure, measure_of
from depgraph.dependency import DependencyGraph
from depgraph.errors import DataError, DepgraphError, one_line
from depgraph.memory import peak_bytes
from depgraph.options import Options
from depgraph.widths import Cost

if TYPE_CHECKING:
    from importance.sweeping import Outcome, Point


@dataclass(frozen=True)
class Maker:
    """Makes points of one model. `options` are those of `graph.plan`; what is loaded stays in the process that loaded it."""

    model: str
    loading: Loading
    data: Path | None = None
    amount: Amount = Amount()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where it computes."""
        return self.loading.device

    def __call__(self, point: Point) -> Outcome:
        """The outcome; only the dense model's errors are raised, others are an outcome too."""
        from importance.sweeping import DENSE, Outcome

        subject, started = self.subject, time.perf_counter()
        if point.name == DENSE:
            found: dict[str, Any] = {"cost": subject.graph.dense_cost, "quality": subject.quality(subject.loaded.model)}
        else:
            found = tried(lambda: self._made(point))
        figure, seconds = subject.measure.figure, time.perf_counter() - started
        return Outcome(point, figure=figure, seconds=seconds, peak_bytes=peak_bytes(), **found)

    @cached_property
    def subject(self) -> Subject:
        """The model with all that belongs to it."""
        loaded = load_model(self.model, self.loading)
        found = TextData([], [])
        if self.data is not None:
            found = text_data(loaded, self.data, read_text(self.data), self.amount)
        graph = depgraph.trace(loaded.model, loaded.args, loaded.kwargs)
        check_patterns(graph, {"protect": (), "only": (), **self.options})
        return Subject(loaded, found, graph, measure_of(loaded, found))

    def _made(self, point: Point) -> dict[str, Any]:
        from importance import named, recipes

        subject, seed = self.subject, self.loading.seed
        batches, loss = subject.found.calibration or subject.loaded.batches, subject.loaded.loss
        if point.name in recipes.RECIPES:
            way: Any = recipes.named(point.name, batches, loss, seed)
        else:
            way = named(point.name, batches=batches, loss=loss, seed=seed)
        model, cost, error = pruned(subject.graph, way, point, self.options)
        return {"cost": cost, "error": error, "quality": subject.quality(model)}

    def settings(self) -> dict[str, str]:
        """All that the outcomes depend on, in words: the contents of files by their hash."""
        file, colon, function = self.model.rpartition(":")
        given = Path(file) if colon and file.endswith(".py") else Path(self.model)
        return {
            "a model of content": content_of_model(given, function),
            "data of content": content_of(self.data) if self.data is not None else "none",
            "--base": self.loading.base or "none",
            "--batches": str(self.amount.batches),
            "--length": str(self.amount.length or "as the model takes"),
            "--seed": str(self.amount.seed),
            "--device": self.loading.device,
            "--dtype": self.loading.dtype,
            "version": depgraph.__version__,
            **{f"--{name.replace('_', '-')}": str(value) for name, value in self.options.items()},
        }


@dataclass(frozen=True)
class Subject:
    """A model, its text, its graph and what is measured of it."""

    loaded: Loaded
    found: TextData
    graph: Any
    measure: Measure

    def quality(self, model: nn.Module) -> float | None:
        """The figure, None where it isn't finite."""
        found = self.measure.of(model)
        return found if math.isfinite(found) else None


def tried(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives of a point, or why it is refused."""
    try:
        return make()
    except DepgraphError as error:
        return {"refused": str(error)}
    except Exception as error:  # one that may pass, such as want of memory: the other points go on
        return {"refused": one_line(error), "again": True}


def pruned(
    graph: DependencyGraph, way: Any, point: Point, options: Mapping[str, Any]
) -> tuple[Any, Cost, float | None]:
    """The model pruned by a recipe or a score, its cost, the error of its check."""
    from importance import Recipe

    target = depgraph.Target(**{point.metric: point.share})  # type: ignore[arg-type]
    if isinstance(way, Recipe):
        done = way.prune(graph, target, **Options.changed(options))
        return done.model, done.after, done.error
    report = graph.plan(way, target, **options).apply_with_report()
    return report.model, report.after, report.check.error if report.check is not None else None


def check_names(names: list[str], *, data: bool) -> None:
    """Raise ScoreError for a name that is neither a recipe's nor a score's, DataError where it needs data and there are none."""
    from importance import names as scores
    from importance import needs_data, recipes
    from importance.choices import pick

    known = {**dict.fromkeys(scores()), **dict.fromkeys(recipes.RECIPES)}
    for name in names:
        pick(known, name, "recipe or score")
        needs = recipes.RECIPES[name].needs != "nothing" if name in recipes.RECIPES else needs_data(name)
        if needs and not data:
            raise DataError(
                f"{name!r} needs data: give a text file with --data, let file.py:function give 'batches', or leave it out of --recipes"
            )


def content_of_model(given: Path, function: str) -> str:
    """What is there, of which loading says best what is wrong with it."""
    if not given.exists():
        return "nothing"
    return content_of(given) + (f" and function {function}" if given.is_file() else "")


def content_of(path: Path) -> str:
    """A hash of a file, or of the files in a folder with their names; raises DataError where they can't be read."""
    digest = hashlib.sha256()
    try:
        for file in _files(path):
            digest.update(f"{file.relative_to(path)}\0".encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
    return digest.hexdigest()[:12]


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
