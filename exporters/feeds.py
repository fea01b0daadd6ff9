"""Inputs for a file, and how far two files' outputs are apart on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch

from depgraph.errors import ExportError, first_line
from exporters.cases import added_up

Feeds = dict[str, np.ndarray]
"""An array for each input of a file."""

_FREE, _SEED = 2, 20


@dataclass(frozen=True)
class Distance:
    """How far the outputs of one file are from another's.

    Attributes:
        error: Of the worst output: length of the difference over length of the output (Euclidean, over all batches);
            for whole numbers and booleans the share that differs.
        largest: The largest absolute difference of one element.
        outputs: The error of each output.
    """

    error: float
    largest: float
    outputs: Mapping[str, float]


def as_feeds(batches: Iterable[Any] | None, session: onnxruntime.InferenceSession) -> list[Feeds]:
    """Every batch with its arrays by the names of the file's inputs; without batches one random.

    Args:
        batches: Each a mapping by input name, a sequence in the inputs' order, or one array or tensor.
    Raises:
        ExportError: There are none, or one doesn't fit the file's inputs.
    """
    if batches is None:
        return [random_feeds(session)]
    if isinstance(batches, (str, Mapping, np.ndarray, torch.Tensor)) or not isinstance(batches, Iterable):
        raise ExportError(f"`data` is a {type(batches).__name__}; give a list of batches.")
    found = [_named(batch, session) for batch in batches]
    if not found:
        raise ExportError("`data` holds no batch; give at least one, an array for each input of the file.")
    return found


def _named(batch: Any, session: onnxruntime.InferenceSession) -> Feeds:
    names = [value.name for value in session.get_inputs()]
    if isinstance(batch, (torch.Tensor, np.ndarray)) or not isinstance(batch, (Mapping, Sequence)):
        batch = (batch,)
    given = dict(batch) if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
    missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
    if missing or unknown or (not isinstance(batch, Mapping) and len(batch) != len(names)):
        raise ExportError(
            f"A batch of `data` doesn't fit the file: its inputs are {', '.join(names)}"
            f"{'; missing ' + ', '.join(missing) if missing else ''}{'; unknown ' + ', '.join(unknown) if unknown else ''}."
        )
    return {name: _array(given[name], session, name) for name in names}


def _array(value: Any, session: onnxruntime.InferenceSession, name: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    wanted = next(i.type for i in session.get_inputs() if i.name == name)
    if array.dtype.kind in "OUS":
        raise ExportError(f"A batch of `data` gives {array.dtype} as {name!r}, where the file wants {wanted}.")
    return array.astype(dtype_of(wanted), copy=False)


_DTYPES = {"float": "float32", "double": "float64"}


def dtype_of(type_name: str) -> np.dtype[Any]:
    """The array's dtype for `tensor(float)` and the like."""
    inner = type_name.partition("(")[2].rstrip(")")
    try:
        return np.dtype(_DTYPES.get(inner, inner))
    except TypeError as error:
        raise ExportError(f"An input of type {type_name} can't be fed from numpy.") from error


def random_feeds(session: onnxruntime.InferenceSession) -> Feeds:
    """Random values of the file's shapes, free sizes being 2: normal floats; 0 and 1 for whole numbers, 1 for masks."""
    generator = np.random.default_rng(_SEED)
    free = {dim: _FREE for value in session.get_inputs() for dim in value.shape if isinstance(dim, str)}
    sizes = added_up({part: _FREE for dim in free for part in dim.split(" + ")} | free)
    feeds: Feeds = {}
    for value in session.get_inputs():
        shape = [sizes[dim] if isinstance(dim, str) else dim or _FREE for dim in value.shape]
        dtype = dtype_of(value.type)
        if dtype.kind == "f":
            feeds[value.name] = generator.standard_normal(shape).astype(dtype)
        else:
            low = 1 if "mask" in value.name or dtype.kind == "b" else 0
            feeds[value.name] = generator.integers(low, 2, shape).astype(dtype)
    return feeds


def run(session: onnxruntime.InferenceSession, feeds: Feeds, what: str) -> list[np.ndarray]:
    """The file's outputs.

    Raises:
        ExportError: ONNX Runtime fails.
    """
    try:
        return list(session.run(None, feeds))
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime fails to run {what} on the data ({first_line(error)}); give other data."
        ) from error


def distance(
    expected: onnxruntime.InferenceSession, actual: onnxruntime.InferenceSession, batches: Sequence[Feeds]
) -> Distance:
    """Run both files on all batches and compare.

    Raises:
        ExportError: One of them fails, or their outputs have other shapes.
    """
    names = [value.name for value in expected.get_outputs()]
    apart, sizes, largest = np.zeros(len(names)), np.zeros(len(names)), 0.0
    for feeds in batches:
        pairs = zip(run(expected, feeds, "the original"), run(actual, feeds, "the new file"), strict=True)
        for i, (reference, got) in enumerate(pairs):
            if reference.shape != got.shape:
                raise ExportError(
                    f"Output {names[i]!r} has shape {got.shape} instead of {reference.shape}; not written."
                )
            difference = reference.astype(np.float64) - got.astype(np.float64)
            real = reference.dtype.kind == "f"
            apart[i] += float((difference**2).sum() if real else (difference != 0).sum())
            sizes[i] += float((reference.astype(np.float64) ** 2).sum() if real else reference.size)
            largest = max(largest, float(np.abs(difference).max(initial=0.0)) if real else 0.0)
    floats = [value.type.startswith(("tensor(float", "tensor(double")) for value in expected.get_outputs()]
    shares = np.divide(apart, sizes, out=np.where(apart > 0, np.inf, 0.0), where=sizes > 0)
    errors = {n: float(np.sqrt(s) if real else s) for n, s, real in zip(names, shares, floats, strict=True)}
    worst = max((np.inf if np.isnan(e) else e for e in errors.values()), default=0.0)
    return Distance(float(worst), largest, errors)
