"""What an ONNX file is run on to be measured: inputs made up from what the file says of them.

A decoder with a cache (inputs `past_key_values.*` beside `input_ids`) is run in two ways: all of a prompt at once, and one more
token after a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime

from depgraph.errors import DepgraphError, ModelError, first_line
from depgraph.onnx_door.examples import made_up, open_dims, runtime_inputs
from exporters.onnx_file import RECORD_KEY

TOKENS, CACHE = "input_ids", re.compile(r"past_key_values\.\d+\.(\w+\.)?(key|value)$")
_BATCHED = 2  # dims from which on the first one is taken for the batch


@dataclass(frozen=True)
class Sizes:
    """Sizes of what a file leaves open. dims: by the name of a dim, or `input:dim`; batch: of all first dims that aren't among them;
    prompt: tokens of a prompt."""

    dims: Mapping[str, int] = field(default_factory=dict)
    batch: int = 1
    prompt: int = 128

    def __post_init__(self) -> None:
        for name, size in {**self.dims, "batch": self.batch, "prompt": self.prompt}.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ModelError(f"the size of {name!r} is {size!r}: give a whole number, 1 or more")


@dataclass(frozen=True)
class Workload:
    """One way to run a file: `kind` is "run", "prefill" or "decode"; `tokens` of a run, where it is of a language model."""

    kind: str
    feed: dict[str, np.ndarray] = field(repr=False)
    tokens: int | None = None

    @property
    def shapes(self) -> str:
        """The shapes of the inputs, those of a cache left out."""
        shown = {name: array.shape for name, array in self.feed.items() if not CACHE.match(name)}
        return ", ".join(f"{name} {'x'.join(map(str, shape)) or '()'}" for name, shape in shown.items())


def workloads(path: Path, session: onnxruntime.InferenceSession, sizes: Sizes) -> list[Workload]:
    """The ways to run a file, each tried once.

    Raises ModelError: the file can't be read, or can't be run on anything made up.
    """
    model = _loaded(path)
    inputs = runtime_inputs(model)
    names = [str(value.name) for value in inputs]
    if TOKENS in names and any(map(CACHE.match, names)):
        ways: list[tuple[str, dict[str, int]]] = [
            ("prefill", _cached(inputs, sizes.prompt, 0)),
            ("decode", _cached(inputs, 1, sizes.prompt)),
        ]
    elif TOKENS in names:
        ways = [("prefill", {f"{value.name}:1": sizes.prompt for value in inputs})]
    else:
        ways = [("run", {})]
    found = [_workload(model, session, (kind, own), sizes) for kind, own in ways]
    if TOKENS in names and not _tells_tokens(session):
        found = [Workload("run", one.feed, one.tokens) for one in found]
    return found


def _loaded(path: Path) -> onnx_ir.Model:
    try:
        return onnx_ir.load(path)
    except Exception as error:
        raise ModelError(f"{path} isn't an ONNX file that can be read: {first_line(error)}.") from error


def _tells_tokens(session: onnxruntime.InferenceSession) -> bool:
    return any(value.name == "logits" and len(value.shape or ()) == 3 for value in session.get_outputs())


def _cached(inputs: Sequence[onnx_ir.Value], new: int, past: int) -> dict[str, int]:
    """Sizes of a decoder's inputs when so many new tokens come after so many past ones."""
    found = {}
    for value in inputs:
        cache = CACHE.match(str(value.name))
        if cache:
            found[f"{value.name}:2"] = max(new, past) if cache[1] == "encoder." else past
        else:
            found[f"{value.name}:1"] = new + past if "mask" in str(value.name) else new
    return found


def _workload(
    model: onnx_ir.Model, session: onnxruntime.InferenceSession, way: tuple[str, dict[str, int]], sizes: Sizes
) -> Workload:
    kind, own = way
    problems: list[str] = []
    for feed in _feeds(model, own, sizes):
        try:
            session.run(None, feed)
        except Exception as error:
            problems.append(first_line(error))
            continue
        tokens = feed[TOKENS].size if TOKENS in feed else None
        return Workload(kind, feed, tokens)
    what = f" ({kind})" if kind != "run" else ""
    raise ModelError(
        f"ONNX Runtime can't run the file{what} on inputs made up for it: {problems[0] if problems else 'it has none'}; give the "
        "sizes of what it leaves open, or a shorter prompt"
    )


def _feeds(model: onnx_ir.Model, own: Mapping[str, int], sizes: Sizes) -> Iterator[dict[str, np.ndarray]]:
    """Inputs in one choice of sizes after the other: those asked for, the kind's own, those recorded, guessed ones."""
    inputs = runtime_inputs(model)
    places = open_dims(inputs)
    first = {f"{v.name}:0": sizes.batch for v in inputs if len(v.shape or ()) >= _BATCHED}
    chosen = {**_recorded(model), **own, **first}
    fixed = {place: chosen[place] for place, name in places.items() if place in chosen and name not in sizes.dims}
    asked = {name: size for name, size in sizes.dims.items() if name in places or name in places.values()}
    try:
        for feed in made_up(model, {**fixed, **asked}, seed=0):
            yield {name: _counting(name, array) for name, array in feed.items()}
    except DepgraphError as error:
        raise ModelError(str(error)) from error


def check_dims(dims: Mapping[str, int], files: Mapping[str, Path]) -> None:
    """Raise ModelError where a size is given for what none of the files leaves open."""
    places = dict(place for path in files.values() for place in open_dims(runtime_inputs(_loaded(path))).items())
    for name in dims:
        if name not in places and name not in places.values():
            listed = ", ".join(dict.fromkeys(places.values())) or "none"
            raise ModelError(f"no input of {' or '.join(files)} leaves a dim {name!r} open; open are {listed}")


def _counting(name: str, array: np.ndarray) -> np.ndarray:
    """Positions count up, as those of a prompt do."""
    if name != "position_ids" or array.ndim < 1 or array.shape[-1] == 1:
        return array
    return np.broadcast_to(np.arange(array.shape[-1], dtype=array.dtype), array.shape).copy()


def _recorded(model: onnx_ir.Model) -> dict[str, int]:
    """Sizes of the inputs that a pruned model was traced with, by `input:dim`, where the file holds its record."""
    try:
        record = json.loads(model.metadata_props.get(RECORD_KEY, "{}"))
        traced: dict[str, Any] = record.get("inputs", {})
        names = [str(value.name) for value in runtime_inputs(model)]
        given = dict(zip(names, traced.get("args", ()), strict=False)) | traced.get("kwargs", {})
    except (ValueError, AttributeError, TypeError):
        return {}
    shapes = {name: spec["tensor"] for name, spec in given.items() if isinstance(spec, dict) and "tensor" in spec}
    return {f"{name}:{d}": size for name, shape in shapes.items() for d, size in enumerate(shape)}
