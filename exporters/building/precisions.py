"""What a precision of the file is worth: how much smaller and faster it makes the dense model, measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from exporters.building.asked import Budget
from exporters.feeds import Feeds
from exporters.onnx_file import data_path
from exporters.quantising import QuantOptions, quantise
from exporters.timing.measure import low, session, timed

_CALIBRATION, _ROUNDS, _WARM_UP = 8, 20, 2
_GROWTH, _LESS = 1.05, 0.999


@dataclass(frozen=True)
class Precision:
    """A precision by its name: a file takes `rest` bytes and `rate` for each byte of float32 weights; `share` of the time.

    The largest file that runs alone, that with a cache, takes `beside` bytes more.
    What a plan can be asked for is `weights` (bytes in float32) and `milliseconds` (of the float32 file).
    """

    name: str
    rest: float = 0.0
    rate: float = 1.0
    share: float = 1.0
    beside: float = 0.0

    def weights(self, file_bytes: float) -> int:
        """Bytes of float32 weights, of which the largest file of this precision takes `file_bytes`."""
        return int((file_bytes - self.rest - self.beside) / self.rate)

    def fewer_weights(self, file_bytes: float, found: float, weights: int) -> int:
        """As `weights`, by a file that took `found` bytes with so many bytes of float32 weights: fewer than these.

        What a file says of what was pruned grows with what goes, so that a little of its rest is added.
        """
        rest = max(found - weights * self.rate, 0) * _GROWTH
        return max(min(int((file_bytes - self.beside - rest) / self.rate), int(weights * _LESS)), 2)

    def file_bytes(self, weights: float) -> float:
        """Bytes of the largest file, of so many bytes of float32 weights."""
        return self.rest + self.beside + weights * self.rate

    def milliseconds(self, ms: float) -> float:
        """How long the float32 file may take, for one of this precision to take `ms`."""
        return ms / self.share


def measured_precision(name: str, dense: Path, weights: int, budget: Budget, data: list[Feeds]) -> Precision:
    """What `name` is worth on the dense file, whose float32 weights take so many bytes.

    Raises ExportError where the model can't be quantised so, or its outputs move beyond that kind's tolerance.
    """
    plain = file_bytes(dense)
    rest = max(plain - weights, 0)
    if name == "float32":
        return Precision(name, rest)
    file = made(name, dense, dense.parent / name / dense.name, data)
    times = side_by_side({"plain": dense, "fewer": file}, data[0], budget.threads)
    return Precision(name, rest, max(file_bytes(file) - rest, 1) / weights, times["fewer"] / times["plain"])


def made(name: str, source: Path, out: Path, data: list[Feeds]) -> Path:
    """The file of a precision, of one in float32; raises ExportError as `quantise` does."""
    if name == "float32":
        return source
    out.parent.mkdir(parents=True, exist_ok=True)
    quantise(source, out, data, options=QuantOptions(name))  # type: ignore[arg-type]
    return out


def side_by_side(files: Mapping[str, Path], feeds: Feeds, threads: int) -> dict[str, float]:
    """Milliseconds of a run of each file, in turns: the lowest tenth, which nothing else on the machine disturbs."""
    opened = {name: session(path, threads) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for number in range(-_WARM_UP, _ROUNDS):
        for name, one in opened.items():
            given = {value.name: feeds[value.name] for value in one.get_inputs()}
            taken = timed(lambda one=one, given=given: one.run(None, given), threads)
            times[name] += [taken] if number >= 0 else []
    return {name: low(found) for name, found in times.items()}


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of the weights beside it."""
    return sum(file.stat().st_size for file in (path, data_path(path)) if file.exists())


def calibration(batches: Iterable[Any] | None, names: list[str], example: Feeds) -> list[Feeds]:
    """Some batches as arrays by the names of a file's inputs, the example first; batches that lack one are left out."""
    found = [example]
    for batch in islice(batches or (), _CALIBRATION):
        given = _named(batch, names)
        if set(names) <= given.keys():
            found.append({name: given[name] for name in names})
    return found


def _named(batch: Any, names: list[str]) -> Feeds:
    if not isinstance(batch, Mapping):
        items = batch if isinstance(batch, (tuple, list)) else (batch,)
        batch = dict(zip(names, items, strict=False))
    return {n: np.asarray(t.detach().cpu()) if hasattr(t, "detach") else np.asarray(t) for n, t in batch.items()}
