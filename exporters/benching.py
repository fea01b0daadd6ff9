"""ONNX files side by side: time of a run, tokens in a second, memory; dense beside pruned, in interleaved runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import depgraph
from depgraph.errors import ExportError, ModelError
from depgraph.story.parts import Timing
from exporters.latency import Latency, interleaved, run_once
from exporters.onnx_check import open_session
from exporters.onnx_file import data_path
from exporters.workloads import Sizes, Workload, check_dims, workloads

_SECONDS = 600.0  # for a file to be loaded and run in a process of its own


@dataclass(frozen=True)
class Running:
    """How files are run: measured rounds (after a warm-up of three), threads, sizes of what they leave open.

    memory: each file is run once more, in a fresh process, to see what it takes.
    """

    rounds: int = 30
    threads: int = 1
    sizes: Sizes = field(default_factory=Sizes)
    memory: bool = True

    def __post_init__(self) -> None:
        for name, count in (("rounds", self.rounds), ("threads", self.threads)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ExportError(f"{name}={count!r}: give a whole number, 1 or more")


@dataclass(frozen=True)
class Measured:
    """One way to run one file. `kind` is "run", "prefill" or "decode"; `tokens` are those of one run, of a language model.

    `speedup` says how many times faster it is than `base`, the first file that is run in this way: the median of the ratios
    of neighbouring runs.
    """

    file: str
    kind: str
    shapes: str
    median_ms: float
    p90_ms: float
    tokens: int | None
    base: str
    speedup: float

    @property
    def tokens_per_second(self) -> float | None:
        """By the median time; None where it isn't a language model."""
        return None if self.tokens is None else 1000 * self.tokens / self.median_ms


@dataclass(frozen=True)
class FileFacts:
    """Bytes of a file with its weights, and the memory that a fresh process held with it at most.

    `rest_bytes` of these it held before the file was loaded. Both are None where memory wasn't measured.
    """

    file: str
    bytes: int
    peak_bytes: int | None = None
    rest_bytes: int | None = None


@dataclass(frozen=True)
class Benched:
    """All that was measured, in the order of the files given."""

    measured: tuple[Measured, ...]
    files: tuple[FileFacts, ...]
    threads: int
    rounds: int
    runtime: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        runs = [{**asdict(one), "tokens_per_second": one.tokens_per_second} for one in self.measured]
        return {**asdict(self), "measured": runs}

    def timings(self) -> tuple[Timing, ...]:
        """For a story: every file but the first of its kind beside that."""
        times = {(one.file, one.kind): one.median_ms for one in self.measured}
        return tuple(
            Timing(_worded(one), "measured", times[one.base, one.kind], one.median_ms, self.threads, one.speedup)
            for one in self.measured
            if one.file != one.base
        )


def bench(paths: Sequence[str | os.PathLike[str]], running: Running | None = None) -> Benched:
    """Measure ONNX files, and all of those in folders, on the CPU; one process runs them in turn, so that ratios are fair.

    Inputs are made up: floats are normal, tokens drawn from the vocabulary, masks are ones.

    Raises:
        ModelError: a path is no ONNX file and no folder that holds some, a file can't be run on anything made up, or a size
            is given for a dim that it doesn't leave open.
        ExportError: ONNX Runtime can't load a file.
    """
    how = Running() if running is None else running
    files = dict(_named(found_files(paths)))
    check_dims(how.sizes.dims, files)
    sessions = {name: open_session(path, how.threads) for name, path in files.items()}
    ways = [(name, way) for name in files for way in _ways(files[name], sessions[name], how.sizes)]
    calls = {_key(name, way): run_once(name, sessions[name], way.feed) for name, way in ways}
    times = {key: Latency(found, how.threads) for key, found in interleaved(calls, how.rounds).items()}
    sessions.clear()
    facts = (_facts(name, path, [way for n, way in ways if n == name], how) for name, path in files.items())
    measured = tuple(_measured(name, way, ways, times) for name, way in ways)
    return Benched(measured, tuple(facts), how.threads, how.rounds, f"onnxruntime {onnxruntime.__version__}")


def found_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The ONNX files that paths name, each once; raises ModelError where one names none."""
    if not paths:
        raise ModelError("there is nothing to measure: name an ONNX file, or a folder that holds one")
    return list(dict.fromkeys(file for path in paths for file in _files_at(Path(path))))


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        held = sorted(file for file in path.iterdir() if file.suffix == ".onnx" and file.is_file())
        if not held:
            what = "is empty" if not any(path.iterdir()) else "holds no ONNX file"
            raise ModelError(f"the folder {path} {what}: depgraph export {path} writes one of a model")
        return held
    if not path.exists():
        raise ModelError(f"{path} doesn't exist: name an ONNX file, or a folder that holds one")
    if path.suffix != ".onnx":
        raise ModelError(f"{path} is neither an ONNX file nor a folder that holds one")
    return [path]


def _named(paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Files by what tells them apart: the last parts of their paths."""
    parts = max((len(path.parts) for path in paths), default=1)
    for count in range(1, parts + 1):
        names = ["/".join(path.parts[-count:]).replace("//", "/") for path in paths]
        if len(set(names)) == len(names) or count == parts:
            yield from zip(names, paths, strict=True)
            return


def _ways(path: Path, session: onnxruntime.InferenceSession, sizes: Sizes) -> list[Workload]:
    try:
        return workloads(path, session, sizes)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error


def _key(name: str, way: Workload) -> str:
    return f"{name} {way.kind}"


def _measured(name: str, way: Workload, ways: Sequence[tuple[str, Workload]], times: dict[str, Latency]) -> Measured:
    alike = [other for other, one in ways if (one.kind, one.shapes) == (way.kind, way.shapes)]
    before = alike[: alike.index(name)]
    base = next((other for other in before if Path(other).name == Path(name).name), alike[0])
    found, first = times[_key(name, way)], times[f"{base} {way.kind}"]
    return Measured(
        name, way.kind, way.shapes, found.median_ms, found.p90_ms, way.tokens, base, found.speedup_over(first)
    )


def _worded(one: Measured) -> str:
    return one.file if one.kind == "run" else f"{one.file}, {one.kind}"


def _facts(name: str, path: Path, ways: Sequence[Workload], how: Running) -> FileFacts:
    aside = data_path(path)
    size = path.stat().st_size + (aside.stat().st_size if aside.is_file() else 0)
    if not how.memory:
        return FileFacts(name, size)
    found = memory_of(path, ways, how.threads)
    return FileFacts(name, size, found["peak"], found["rest"])


def memory_of(path: Path, ways: Sequence[Workload], threads: int) -> dict[str, int]:
    """Bytes that a fresh process held at most when it had loaded and run a file (`peak`), and before that (`rest`).

    Raises ExportError when the process failed, or took too long.
    """
    root = str(Path(depgraph.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, inherited)))}
    script = Path(__file__).with_name("memory_probe.py")
    with tempfile.TemporaryDirectory() as folder:
        feeds = [str(Path(folder) / f"{way.kind}.npz") for way in ways]
        for feed, way in zip(feeds, ways, strict=True):
            np.savez(feed, **way.feed)  # type: ignore[arg-type]
        command = [sys.executable, str(script), str(threads), str(path), *feeds]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{path.name} took more than {_SECONDS:.0f} s in a process of its own: leave memory out"
            ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExportError(f"{path.name} can't be run in a process of its own: {last}")
    return json.loads(done.stdout.splitlines()[-1])
