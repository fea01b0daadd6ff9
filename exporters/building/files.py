"""An ONNX file as what a build is asked for: without a loss or labels, quality is how far its outputs move."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import depgraph
from depgraph.errors import DataError
from depgraph.npz import NpzFolder
from depgraph.onnx_door.loading import input_names, load
from depgraph.onnx_door.running import Running
from depgraph.wording import counted
from exporters.building.asked import Subject
from exporters.feeds import Feeds
from importance.losses import Loss
from importance.sweeping import NO_DATA, shift_figure

_HELD_OUT = 5  # of so many batches one is held out


def file_subject(
    path: str | os.PathLike[str],
    batches: list[Feeds] | NpzFolder | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Subject:
    """An ONNX file with what it is run on, for `build`.

    Args:
        batches: dicts of arrays by input name, or a folder of .npz files. The last fifth is held out, and quality is how far the
            outputs move there; of fewer than five, on all. None: on the example, and no score from data can be taken.
        sizes: of dims that the file leaves open, by name; without these it is run on inputs of the first batch, or made up.

    Raises what `depgraph.trace` does for a file that can't be read, DataError for no batches, or one that lacks an input.
    """
    names = input_names(path)
    if batches is None:
        example = depgraph.trace(path, (), sizes).inputs  # type: ignore[attr-defined]
        moved = Shift(Path(path), [example])
        return Subject(Path(path), (), example, moved, shift_figure(NO_DATA))
    first: dict[str, Any] | None = next(iter(batches), None)
    if first is None:
        raise DataError("there are no batches: give some, or None to measure on the example")
    if missing := [name for name in names if name not in first]:
        raise DataError(f"the first batch lacks the input {missing[0]!r}: the file takes {', '.join(map(repr, names))}")
    aside = len(batches) // _HELD_OUT
    score, held_out = (batches[:-aside], batches[-aside:]) if aside else (batches, batches)
    on = (
        counted(len(held_out), "held-out batch", "held-out batches")
        if aside
        else f"the {len(batches)} batches that scores are from"
    )
    example = dict(sizes) if sizes else {name: first[name] for name in names}
    return Subject(Path(path), (), example, Shift(Path(path), held_out), shift_figure(on), score)


@dataclass
class Shift:
    """How far the outputs of a model move from those of the file at `path` on batches, as a share of their length."""

    path: Path
    batches: Iterable[Feeds] = field(repr=False)

    def __call__(self, model: ir.Model) -> float:
        return shift(Running(model), self._dense, self.batches)

    @cached_property
    def _dense(self) -> Running:
        return Running(load(self.path)[0])


def shift(pruned: Running, dense: Running, batches: Iterable[Feeds]) -> float:
    """How far the outputs of one model are from those of another, as a share of the length of all of these.

    Outputs that aren't floats, or have become narrower, aren't compared.
    """
    pairs: list[tuple[float, float]] = []
    for given in batches:
        feeds = {name: array for name, array in given.items() if name in dense.inputs}
        pairs += [_lengths(*pair) for pair in zip(pruned(feeds), dense(feeds), strict=True)]
    return _share(pairs)


def moving_from(model: ir.Model) -> Loss:
    """A loss of what a file gives, by name or one alone: how far it is from what `model` gives for the same batch."""
    dense = Running(model)
    known: dict[int, tuple[Feeds, list[np.ndarray]]] = {}  # with the batch, so that its number isn't given to another

    def moved(output: Any, batch: Feeds) -> torch.Tensor:
        if id(batch) not in known:
            known[id(batch)] = (
                batch,
                dense({name: np.asarray(array) for name, array in batch.items() if name in dense.inputs}),
            )
        listed = output.values() if isinstance(output, Mapping) else [output]
        made = (np.asarray(array) for array in listed)
        return torch.tensor(_share(_lengths(*pair) for pair in zip(made, known[id(batch)][1], strict=True)))

    return moved


def _lengths(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The squared length of a difference, and of what it is a difference from; none where they can't be compared."""
    if ours.dtype.kind != "f" or ours.shape != theirs.shape:
        return 0.0, 0.0
    apart = np.square((ours - theirs).astype(np.float64)).sum()
    return float(apart), float(np.square(theirs.astype(np.float64)).sum())


def _share(pairs: Iterable[tuple[float, float]]) -> float:
    apart, whole = (sum(lengths) for lengths in zip(*pairs, strict=True))
    return math.sqrt(apart / max(whole, 1e-30))


__all__ = ["file_subject", "moving_from", "shift"]
