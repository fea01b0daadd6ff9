"""Residual streams written in the basis of their principal components, so that what is cut from them is what varies least.

Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns" (METHODS.md 2.11). What is read from a
stream X [positions, channels], after its normalisations and over all places where it is read, gives H = sum X'X; the eigenvectors
of H are the new basis Q. Writers put out Q'W, readers take W Q, and the model computes what it did.

With one rotation for a whole stream the architecture stays what it is. The published way has one for every normalisation: where
a stream passes from Q to P it goes through the product Q'P, which is put into the graph form of the model (`importance.parting`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.cutting.sides import Side
from depgraph.errors import DataError, RotationError, ScoreError
from depgraph.observing import Observer
from depgraph.plan import Plan
from importance.calling import calls_of, check_batches, samples_in
from importance.choices import pick
from importance.components import basis, components
from importance.folding import TIES, computed, put, solved
from importance.gradients import require_module
from importance.stream_parts import Key, Stream
from importance.unscaled import BASES, outputs, require_same

Widths = Mapping[str, int]


def _as_dense(scores: np.ndarray, width: int) -> float:
    """A normalisation makes vectors as long as the root of their width: as long as they were in the dense model, as the paper."""
    return math.sqrt(len(scores) / width)


def _as_kept(scores: np.ndarray, width: int) -> float:
    """As long as the part that stays was, on average."""
    total = float(scores.sum())
    return _as_dense(scores, width) * math.sqrt(float(scores[:width].sum()) / total if total > 0 else 1.0)


LENGTHS: dict[str, Callable[[np.ndarray, int], float]] = {"dense": _as_dense, "kept": _as_kept}
"""How long normalised vectors are after the cut: scales, which are ones, become this function of eigenvalues and width."""


SIGNALS = {
    "sliced": "what is read of a stream once the streams before it have lost what they lose, as the paper",
    "dense": "what is read of it in the dense model",
}


@dataclass(frozen=True)
class Rotation:
    """How streams are rotated.

    damping: added to the diagonal of H, as a share of its mean. lengths: one of `LENGTHS`. ties: one of `folding.TIES`. bases: one
    of `unscaled.BASES`, "one" for a whole stream or "each" normalisation's. signals: one of `SIGNALS`.
    """

    damping: float = 0.01
    lengths: str = "dense"
    ties: str = "untie"
    bases: str = "one"
    signals: str = "sliced"

    def __post_init__(self) -> None:
        pick(LENGTHS, self.lengths, "kind of lengths")
        pick(TIES, self.ties, "way with ties")
        pick(BASES, self.bases, "number of bases")
        pick(SIGNALS, self.signals, "kind of signals")
        if not 0 <= self.damping < math.inf:
            raise ScoreError(f"damping must be a finite number of at least 0, it is {self.damping}")


@dataclass
class Principal:
    """A copy of a model whose normalisations have no scales, and the principal components of its residual streams.

    `graph` is the copy's, `expected` what it puts out for the example. `scores` has for each stream the eigenvalues of H, in descending
    order (zeros for other axes): what is read of every channel after `turn`, squared, on average. `directions` has the
    eigenvectors as columns, `bases` the Q by which streams were turned. `gather` gives H of one stream once others have lost
    groups. `notes` say which weights are no longer one.
    """

    graph: DependencyGraph = field(repr=False)
    expected: list[Tensor] = field(repr=False)
    streams: dict[str, Stream] = field(repr=False)
    directions: dict[str, Tensor] = field(repr=False)
    scores: dict[str, np.ndarray]
    how: Rotation
    gather: Callable[[str, Mapping[str, Any]], Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()
    bases: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        """The copy."""
        return self.graph.model

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are streams."""
        return tuple(self.streams)

    def turn(self, widths: Widths | None = None) -> None:
        """Write the streams of the copy in their new bases, in place and once; what it computes stays the same.

        `widths`: how many channels of a stream are going to stay, by its axis; all by default. Which bases a layer norm
        allows depends on it, see `importance.components`.

        Raises RotationError when it has been done, or when the copy then computes something else.
        """
        self._begin()
        for name, stream in self.streams.items():
            self._turn(name, self.directions[name], (widths or {}).get(name, stream.width))
        require_same(self.expected, self.graph)

    def settle(self, plan: Plan) -> None:
        """Turn the streams for what a plan leaves of them, and give the normalisations a scale that suits it, see `LENGTHS`.

        Streams are turned in the order in which they are read; `SIGNALS` says whether by what is read in the dense model.

        Raises RotationError when they have been turned, or when the copy computes something else after a turn.
        """
        self._begin()
        gone: dict[str, Any] = {}
        for name, stream in self.streams.items():
            vectors, values = self.directions[name], self.scores[name]
            if gone and self.how.signals == "sliced":
                vectors, found = components(self.gather(name, gone), self.how.damping, centred=stream.centred)
                values = found.numpy()
            width = stream.width - len(plan.removal.get(name, ()))
            before = outputs(self.graph)
            self._turn(name, vectors, width)
            require_same(before, self.graph)
            _rescale(self.graph, stream, LENGTHS[self.how.lengths](values, width))
            if width < stream.width:
                gone[name] = plan.removal[name]

    def _begin(self) -> None:
        if self.bases:
            raise RotationError("the streams have been turned already: rotate the model anew")

    def _turn(self, name: str, directions: Tensor, width: int) -> None:
        self.bases[name] = basis(directions, width, centred=self.streams[name].centred)
        _turned(self.graph, self.streams[name], self.bases[name])


def rotate(
    graph: DependencyGraph, batches: Iterable[Any], widths: Widths | None = None, how: Rotation | None = None
) -> Principal:
    """A copy of the graph's model with its residual streams written in the basis of their principal components.

    The first channels of a stream are then the ones to keep: `graph.plan(found.scores, target, only=list(found.streams))` of
    the result's graph cuts the others. `widths`, by axis, say how many that will be; for layer norms it must be known.

    Raises:
        NothingToPrune: the model has no residual stream that may lose a channel.
        RotationError: something acts on the channels of a stream one by one; the message names the place.
        DataError: there are no batches, one doesn't fit, or NaN is read from a stream.
    """
    found = principal(graph, batches, how)
    found.turn(widths)
    return found


def principal(graph: DependencyGraph, batches: Iterable[Any], how: Rotation | None = None) -> Principal:
    """As `rotate`, before the streams are turned: a plan can be made of the scores, and then be settled (`Principal.settle`)."""
    require_module(graph, "a rotation", "modules whose weights it turns")
    check_batches(batches)
    how = how or Rotation()
    graph.require_finite(ScoreError)
    begun = BASES[how.bases](graph, how.ties)
    again = begun.graph
    order = {node.name: k for k, node in enumerate(again.nodes)}
    first = {
        axis: min((order[use.op.name] for use in stream.reads), default=0) for axis, stream in begun.streams.items()
    }
    streams = {axis: begun.streams[axis] for axis in sorted(begun.streams, key=first.__getitem__)}
    signals = {axis: _one_each(stream, begun.products) for axis, stream in streams.items()}
    observer = again.observer()
    grams = _grams(observer, signals, batches)
    found = {axis: components(gram, how.damping, centred=streams[axis].centred) for axis, gram in grams.items()}
    scores = {axis.name: np.zeros(axis.size) for axis in again.axes}
    scores.update({axis: values.numpy() for axis, (_, values) in found.items()})

    def gather(axis: str, gone: Mapping[str, Any]) -> Tensor:
        side = Side(again.widths.at(gone), again.widths.at({}))
        return _grams(observer, {axis: signals[axis]}, batches, side)[axis]

    directions = {axis: vectors for axis, (vectors, _) in found.items()}
    return Principal(again, begun.expected, streams, directions, scores, how, gather, begun.notes)


def _grams(
    observer: Observer, signals: Mapping[str, list[Key]], batches: Iterable[Any], side: Side | None = None
) -> dict[str, Tensor]:
    """H of every stream: X'X over the rows of what comes in at these consumers, divided by their number."""
    graph = observer.graph
    sums = {axis: torch.zeros(graph[axis].size, graph[axis].size, dtype=torch.float64) for axis in signals}
    rows = dict.fromkeys(signals, 0)
    wanted = {key: axis for axis, keys in signals.items() for key in keys}
    with quiet(graph.model):
        for inputs in calls_of(graph, batches, "to rotate by"):
            for key, flat in _read_at(observer, inputs, wanted, side):
                sums[wanted[key]] += (flat.T @ flat).cpu()
                rows[wanted[key]] += len(flat)
    if not any(rows.values()) and signals:
        raise DataError("the batches are empty: no row of them is read from a residual stream, give some with samples")
    for axis, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(f"NaN or infinity is read from {axis!r}: look at the weights before it and at the batches")
    return {axis: total / max(rows[axis], 1) for axis, total in sums.items()}


def _read_at(observer: Observer, inputs: Any, keys: Container[Key], side: Side | None) -> Iterator[tuple[Key, Tensor]]:
    """The rows [rows, channels], float64, that come in at these consumers in a call; the run ends with the last of them."""
    samples = samples_in(observer.graph, *inputs)
    left = sum(meeting.key in keys for meeting in observer.runnable(*inputs).meetings)
    with closing(observer.steps(inputs, lambda meeting: meeting.key in keys, side)) as steps:
        for _, met in zip(range(left), steps, strict=False):
            yield (
                met.meeting.key,
                samples.rows(met.operand, met.meeting.dim, torch.float64, places=met.operand_from).flat,
            )


def _one_each(stream: Stream, products: frozenset[str]) -> list[Key]:
    """A consumer for each of the signals that the model's own weights read from a stream; of products, where only these read."""
    found: list[Key] = []
    for keys in _own(stream, products) or list(stream.signals.values()):
        if not set(keys) & set(found):
            found.append(keys[0])
    return found


def _own(stream: Stream, products: frozenset[str]) -> list[list[Key]]:
    own = ([key for key in keys if key[0] not in products] for keys in stream.signals.values())
    return [keys for keys in own if keys]


def _turned(graph: DependencyGraph, stream: Stream, turn: Tensor) -> None:
    """Write one stream of the graph's own model in another basis."""
    tensors = graph.tensors()
    made: dict[str, Tensor] = {}
    for target, dim in dict.fromkeys(use.key for use in (*stream.writes, *stream.reads)):
        before = made.get(target, tensors[target].detach().double().cpu())
        made[target] = (before.movedim(dim, -1) @ turn).movedim(-1, dim)
    for norm in stream.norms:
        shift = None if norm.shift is None else computed(graph, norm.shift).reshape(-1)
        if norm.shift is not None and shift is not None and bool(shift.any()):
            name, value = solved(graph, norm.shift, shift.expand(stream.width) @ turn)
            made[name] = value
    put(graph.model, made)


def _rescale(graph: DependencyGraph, stream: Stream, by: float) -> None:
    """Multiply what the normalisations of a stream make with a number, where they have a scale that can."""
    scales = [norm.scale for norm in stream.norms if norm.scale is not None]
    wanted = [by * computed(graph, scale).reshape(-1).expand(stream.width) for scale in scales]
    put(graph.model, dict(solved(graph, scale, value) for scale, value in zip(scales, wanted, strict=True)))
