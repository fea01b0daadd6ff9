"""Time of an ONNX file in ONNX Runtime, and of several side by side on a machine that others use too."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from torch import Tensor

from depgraph.errors import ExportError, first_line
from exporters.onnx_check import open_session

_WARM_UP = 3

Feed = Mapping[str, "Tensor | np.ndarray"] | Sequence["Tensor | np.ndarray"]
"""Inputs of a file by name, or in its order."""


@dataclass(frozen=True)
class Latency:
    """Times of single runs in milliseconds, in the order they were taken."""

    samples_ms: tuple[float, ...]
    threads: int

    @property
    def median_ms(self) -> float:
        """The median time of a run."""
        return statistics.median(self.samples_ms)

    @property
    def p90_ms(self) -> float:
        """The time that nine in ten runs keep within."""
        return float(np.percentile(self.samples_ms, 90))

    @property
    def min_ms(self) -> float:
        """The fastest run: what the machine does undisturbed."""
        return min(self.samples_ms)

    def speedup_over(self, other: Latency) -> float:
        """How many times faster than `other`: the median of the ratios of runs with the same number.

        Fair on a noisy machine for what `compare_latency` measured, where such runs were neighbours in time.
        """
        pairs = zip(other.samples_ms, self.samples_ms, strict=False)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.median_ms:.2f} ms (median of {len(self.samples_ms)}, {threads})"


def latency(path: str | os.PathLike[str], inputs: Feed, runs: int = 30, threads: int = 1) -> Latency:
    """Run an ONNX file on the CPU `runs` times after a warm-up.

    Raises:
        ExportError: ONNX Runtime can't load the file or run it on these inputs.
    """
    return compare_latency({"": path}, inputs, rounds=runs, threads=threads)[""]


def compare_latency(
    paths: Mapping[str, str | os.PathLike[str]], inputs: Feed, rounds: int = 30, threads: int = 1
) -> dict[str, Latency]:
    """Time several files on the same inputs, one run of each per round, so that a busy moment hits all alike.

    The order turns around from round to round.

    Raises:
        ExportError: ONNX Runtime can't load a file or run it on these inputs.
    """
    if rounds < 1:
        raise ExportError(f"rounds={rounds}: at least one run is needed to measure a time.")
    sessions = {name: open_session(Path(path), threads) for name, path in paths.items()}
    feeds = {name: _feed(session, inputs) for name, session in sessions.items()}
    calls = {name: run_once(str(paths[name]), sessions[name], feeds[name]) for name in sessions}
    return {name: Latency(times, threads) for name, times in interleaved(calls, rounds).items()}


def interleaved(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, ...]]:
    """What each call returned in every round, after a warm-up of three; the order turns around from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(-_WARM_UP, rounds):
        for name in names if number % 2 else reversed(names):
            found = calls[name]()
            if number >= 0:
                samples[name].append(found)
    return {name: tuple(found) for name, found in samples.items()}


def _feed(session: onnxruntime.InferenceSession, inputs: Feed) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_inputs()]
    given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
    missing = [name for name in names if name not in given]
    if missing:
        raise ExportError(f"The file needs the inputs {', '.join(names)}, but {', '.join(missing)} is not given.")
    return {name: _array(given[name]) for name in names}


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def run_once(name: str, session: onnxruntime.InferenceSession, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
    """A call that runs the session once and returns the milliseconds it took; raises ExportError where it can't be run."""

    def call() -> float:
        started = time.perf_counter()
        try:
            session.run(None, dict(feed))
        except Exception as error:
            raise ExportError(f"ONNX Runtime can't run {name} on these inputs: {first_line(error)}.") from error
        return (time.perf_counter() - started) * 1000

    return call
