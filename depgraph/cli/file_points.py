"""The points of a sweep of an ONNX file: it is traced once in a process, pruned for each, and run beside the dense file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import depgraph
from depgraph.cli.onnx_files import example_of, folder_of
from depgraph.cli.options import check_patterns
from depgraph.cli.points import content_of, content_of_model, pruned, tried
from depgraph.errors import ScoreError
from depgraph.memory import peak_bytes
from depgraph.onnx_door.running import Running
from depgraph.onnx_door.saving import write

if TYPE_CHECKING:
    from importance.sweeping import Outcome, Point


@dataclass(frozen=True)
class FileMaker:
    """Makes points of one file; quality is how far its outputs move on `data`, a folder of .npz files, or on what is made up."""

    model: str
    sizes: Mapping[str, int]
    data: Path | None
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    device = "cpu"

    def __call__(self, point: Point) -> Outcome:
        """The outcome; only the dense file's errors are raised, others are an outcome too."""
        from importance.sweeping import DENSE, NO_DATA, Outcome, shift_figure

        graph, started = self.graph, time.perf_counter()
        if point.name == DENSE:
            found: dict[str, Any] = {"cost": graph.dense_cost, "quality": 0.0}
        else:
            found = tried(lambda: self._made(point))
        on = NO_DATA if self.data is None else f"{len(self.batches)} batches"
        figure = shift_figure(on)
        seconds = time.perf_counter() - started
        return Outcome(point, figure=figure, seconds=seconds, peak_bytes=peak_bytes(), **found)

    @cached_property
    def batches(self) -> Any:
        """What the outputs are compared on: dicts of arrays by input name."""
        return [self.graph.inputs] if self.data is None else folder_of(self.data)

    @cached_property
    def graph(self) -> Any:
        """The traced file."""
        graph = depgraph.trace(
            self.model, example_of(self.model, self.sizes, None if self.data is None else folder_of(self.data))
        )
        check_patterns(graph, {"protect": (), "only": (), **self.options})
        return graph

    @cached_property
    def _dense(self) -> Running:
        return Running(self.graph.model)

    def _made(self, point: Point) -> dict[str, Any]:
        from exporters.building.files import shift
        from importance import named, recipes

        data = None if self.data is None else self.batches
        if point.name in recipes.RECIPES:
            way: Any = recipes.for_file(point.name, data, self.seed)
        else:
            way = named(point.name, batches=data, seed=self.seed)
        model, cost, error = pruned(self.graph, way, point, self.options)
        dense_ms, ms = self._times(model)
        moved = shift(Running(model), self._dense, self.batches)
        quality = moved if math.isfinite(moved) else None
        return {"cost": cost, "error": error, "quality": quality, "dense_ms": dense_ms, "ms": ms}

    def _times(self, pruned: Any) -> tuple[float, float]:
        """Milliseconds of a run of both files on the example, in turns."""
        from exporters.building.precisions import side_by_side

        with tempfile.TemporaryDirectory() as folder:
            files = {"dense": Path(folder) / "dense.onnx", "pruned": Path(folder) / "pruned.onnx"}
            for name, model in (("dense", self.graph.model), ("pruned", pruned)):
                write(model, files[name])
            found = side_by_side(files, self.graph.inputs, 1)
        return found["dense"], found["pruned"]

    def settings(self) -> dict[str, str]:
        """All that the outcomes depend on, in words: the contents of files by their hash."""
        beside = Path(self.model + ".data")
        return {
            "a model of content": content_of_model(Path(self.model), "")
            + (content_of(beside) if beside.is_file() else ""),
            "data of content": content_of(self.data) if self.data is not None else "none",
            "--size": ", ".join(f"{name}={size}" for name, size in self.sizes.items()) or "none",
            "--seed": str(self.seed),
            "version": depgraph.__version__,
            **{f"--{name.replace('_', '-')}": str(value) for name, value in self.options.items()},
        }


def refuse_gradients(names: list[str]) -> None:
    """Raise ScoreError for a name that needs gradients, which a file doesn't give."""
    from importance import needs_gradients, recipes
    from importance.recipes import for_file

    for name in names:
        if name in recipes.RECIPES:
            for_file(name, [])
        elif needs_gradients(name):
            raise ScoreError(
                f"{name!r} needs gradients, which an ONNX file doesn't give: load the PyTorch model, or take magnitude, or with --data "
                "one from activations such as wanda-sp, flap or obs"
            )
