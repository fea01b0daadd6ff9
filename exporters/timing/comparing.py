"""Predicted beside measured: what a latency model says of a pruned model, and what it takes in truth."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from depgraph.errors import ExportError, first_line
from depgraph.plan import Plan
from exporters.timing.measure import low, session, timed
from exporters.timing.model import MeasuredLatency


@dataclass(frozen=True)
class Compared:
    """Milliseconds of the dense and the pruned model, taken in turns, and the share that was predicted."""

    dense_ms: float
    pruned_ms: float
    predicted: float

    @property
    def measured(self) -> float:
        """The pruned model's time as a share of the dense one's."""
        return self.pruned_ms / self.dense_ms

    @property
    def error(self) -> float:
        """By which share of the measured ratio the predicted one is above it."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        return (
            f"latency: {self.dense_ms:.3g} ms -> {self.pruned_ms:.3g} ms ({self.measured:.1%}) measured, "
            f"{self.predicted:.1%} predicted"
        )


def predicted_and_measured(
    latency: MeasuredLatency, plan: Plan, pruned: str | os.PathLike[str], rounds: int = 30
) -> Compared:
    """Run the dense and the pruned ONNX model in turns, with as many threads as the latency model is for.

    Args:
        plan: A plan of the latency model's graph; `pruned` is the ONNX file of what it makes.

    Raises:
        ProfileError: the latency model is of another machine, or another version of ONNX Runtime.
        ExportError: ONNX Runtime can't load a file or run it on the inputs that the model was traced with.
        TargetError: the plan is of another graph.
    """
    latency.profile.check_here()
    threads = latency.profile.machine["threads"]
    predicted = latency.ms(plan.kept()) / latency.ms(plan.graph.widths.at({}))
    feeds = {name: np.asarray(array) for name, array in latency.file.inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        ir.save(latency.file.model, dense, external_data="dense.onnx.data")
        sessions = {name: _opened(path, threads) for name, path in (("dense", dense), ("pruned", Path(pruned)))}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for number in range(-2, rounds):
            for name, opened in sessions.items():
                taken = timed(lambda opened=opened: _run(opened, feeds), threads)
                times[name] += [taken] if number >= 0 else []
    return Compared(low(times["dense"]), low(times["pruned"]), predicted)


def _opened(path: Path, threads: int) -> Any:
    try:
        return session(path, threads)
    except Exception as error:
        raise ExportError(f"ONNX Runtime can't load {path.name}: {first_line(error)}.") from error


def _run(opened: Any, feeds: dict[str, np.ndarray]) -> None:
    names = [value.name for value in opened.get_inputs()]
    try:
        opened.run(None, {name: feeds[name] for name in names})
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime can't run the model on the inputs it was traced with: {first_line(error)}."
        ) from error
