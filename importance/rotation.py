"""Residual streams written in the basis of their principal components, so that what is cut from them is what varies least.

Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns" (METHODS.md 2.11), with one rotation
for a whole stream: the architecture stays what it is, and no products are put into the residual paths. What is read from a stream
X [positions, channels], after its normalisations and over all places where it is read, gives H = sum X'X; the eigenvectors of H
are the new basis Q. Writers put out Q'W, readers take W Q, and the model computes what it did.

A normalisation that subtracts the mean of its channels (layer norm) commutes only with bases in which all channels weigh the same.
There, the first `width` channels span the first `width - 1` principal components of what has mean zero, and the last channels the
others, in two blocks that each have mean zero: cutting the second block is then as good as cutting components, for that one width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.cutting.computed import without_history
from depgraph.errors import DataError, RotationError, ScoreError
from depgraph.observing import Met
from depgraph.offloading import own_copy
from depgraph.plan import Plan
from importance.calling import check_batches, inputs_of, moved
from importance.choices import pick
from importance.folding import TIES, Folded, computed, fold, put, solved
from importance.gradients import require_module
from importance.obs import damped
from importance.rows import Samples
from importance.shortcuts import traced_again, with_shortcuts
from importance.stream_parts import Key, Stream
from importance.streams import stream_of
from importance.units import units

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


@dataclass
class Principal:
    """A copy of a model whose normalisations have no scales, and the principal components of its residual streams.

    `graph` is the copy's, `expected` what it puts out for the example. `scores` has for each stream the eigenvalues of H, in descending
    order (zeros for other axes): what is read of every channel after `turn`, squared, on average. `directions` has the
    eigenvectors as columns, `bases` the Q by which streams were turned. `notes` say which weights are no longer one.
    """

    graph: DependencyGraph = field(repr=False)
    expected: list[Tensor] = field(repr=False)
    streams: dict[str, Stream] = field(repr=False)
    directions: dict[str, Tensor] = field(repr=False)
    scores: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()
    lengths: str = "dense"
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
        allows depends on it, see the module's text.

        Raises RotationError when it has been done, or when the copy then computes something else.
        """
        if self.bases:
            raise RotationError("the streams have been turned already: rotate the model anew")
        for name, stream in self.streams.items():
            self.bases[name] = basis(self.directions[name], (widths or {}).get(name), centred=stream.centred)
            _turned(self.graph, stream, self.bases[name])
        _require_same(self.expected, self.graph)

    def settle(self, plan: Plan) -> None:
        """Turn the streams for what a plan leaves of them, and give the normalisations a scale that suits it, see `LENGTHS`."""
        widths = {name: stream.width - len(plan.removal.get(name, ())) for name, stream in self.streams.items()}
        self.turn(widths)
        for name, stream in self.streams.items():
            _rescale(self.graph, stream, LENGTHS[self.lengths](self.scores[name], widths[name]))


@dataclass(frozen=True)
class Rotation:
    """How streams are rotated.

    damping: added to the diagonal of H, as a share of its mean. lengths: one of `LENGTHS`. ties: one of `folding.TIES`. bases: one
    of `BASES`.
    """

    damping: float = 0.01
    lengths: str = "dense"
    ties: str = "untie"
    bases: str = "one"

    def __post_init__(self) -> None:
        pick(LENGTHS, self.lengths, "kind of lengths")
        pick(TIES, self.ties, "way with ties")
        pick(BASES, self.bases, "number of bases")
        if not 0 <= self.damping < math.inf:
            raise ScoreError(f"damping must be a finite number of at least 0, it is {self.damping}")


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
    begun = BASES[how.bases](graph, how.ties)
    again, streams = begun.graph, begun.streams
    grams = _grams(again, streams, batches)
    components = {axis: _components(gram, how.damping, streams[axis]) for axis, gram in grams.items()}
    directions = {axis: vectors for axis, (vectors, _) in components.items()}
    scores = {axis.name: np.zeros(axis.size) for axis in again.axes}
    scores.update({axis: values.numpy() for axis, (_, values) in components.items()})
    return Principal(again, begun.expected, streams, directions, scores, begun.notes, how.lengths)


@dataclass(frozen=True)
class _Begun:
    """A graph of a copy whose normalisations have no scales, what it must compute, its streams, and what to know of it."""

    graph: DependencyGraph
    expected: list[Tensor]
    streams: dict[str, Stream]
    notes: tuple[str, ...]


def _one(graph: DependencyGraph, ties: str) -> _Begun:
    """The model as it is."""
    folded = fold(graph, [stream_of(graph, axis) for axis in units(graph, "stream")], ties)
    again, expected = _folded_copy(graph, folded)
    return _Begun(again, expected, {axis: stream_of(again, axis) for axis in units(again, "stream")}, _told(folded))


def _each(graph: DependencyGraph, ties: str) -> _Begun:
    """Its graph form, with products where a stream passes from one basis to the next."""
    begun = with_shortcuts(graph, ties)
    folded = fold(begun.graph, [stream_of(begun.graph, axis) for axis in begun.axes], ties)
    put(begun.graph.model, folded.tensors, folded.untied)
    expected = _outputs(begun.graph if folded.flattened else graph)
    streams = {axis: stream_of(begun.graph, axis) for axis in begun.axes}
    return _Begun(begun.graph, expected, streams, (*begun.notes, *_told(folded)))


BASES: dict[str, Callable[[DependencyGraph, str], _Begun]] = {"one": _one, "each": _each}
"""One rotation for a whole stream; or one for each normalisation, with products on the residual paths between them."""


def _told(folded: Folded) -> tuple[str, ...]:
    notes = [f"{name} is a weight of its own now: a scale was multiplied into it" for name in folded.untied]
    notes += [f"{name} has its mean for all channels now: its reader is a table too" for name in folded.flattened]
    return tuple(notes)


def _folded_copy(graph: DependencyGraph, folded: Folded) -> tuple[DependencyGraph, list[Tensor]]:
    """The graph of a copy with other tensors, and what it computes on the example."""
    model = own_copy(graph.model, without_history(graph.model))
    put(model, folded.tensors, folded.untied)
    again = traced_again(graph, model)
    if folded.flattened:
        return again, _outputs(again)
    expected = _outputs(graph)
    config: Any = getattr(model, "config", None)
    if folded.untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # a library that reads it would tie the weights again
        told = traced_again(graph, model)
        try:
            _require_same(expected, told)
            return told, expected
        except (RotationError, ValueError):
            config.tie_word_embeddings = True  # it decides on something else, too
    return again, expected


def _grams(graph: DependencyGraph, streams: Mapping[str, Stream], batches: Iterable[Any]) -> dict[str, Tensor]:
    """H of every stream: X'X over the rows of all that is read of it, each signal once, divided by their number."""
    sums = {axis: torch.zeros(stream.width, stream.width, dtype=torch.float64) for axis, stream in streams.items()}
    rows = dict.fromkeys(streams, 0)
    wanted = {key: axis for axis, stream in streams.items() for key in _one_each(stream)}
    samples, observer, count = Samples(1), graph.observer(), 0

    def watch(met: Met) -> None:
        axis = wanted.get(met.meeting.key)
        if axis is not None:
            flat = samples.rows(met.operand, met.meeting.dim, torch.float64).flat
            sums[axis] += (flat.T @ flat).cpu()
            rows[axis] += len(flat)

    device = next((t.device for t in graph.tensors().values()), torch.device("cpu"))
    with quiet(graph.model):
        for batch in batches:
            args, kwargs = inputs_of(graph.model, moved(batch, device))
            samples = Samples.of(args, kwargs)
            observer.run((args, kwargs), watch=watch)
            count += 1
    if not count:
        raise DataError("there are no batches to rotate by (a generator gives its batches only once: pass a list)")
    for axis, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(f"NaN or infinity is read from {axis!r}: look at the weights before it and at the batches")
    return {axis: total / max(rows[axis], 1) for axis, total in sums.items()}


def _one_each(stream: Stream) -> list[Key]:
    """A consumer for each of the signals that are read from a stream."""
    found: list[Key] = []
    for keys in stream.signals.values():
        if not set(keys) & set(found):
            found.append(keys[0])
    return found


def _components(gram: Tensor, damping: float, stream: Stream) -> tuple[Tensor, Tensor]:
    """Eigenvectors as columns and eigenvalues, descending; that of equal weights comes last where a mean is subtracted."""
    spread = damped(gram, damping)
    if not stream.centred:
        values, vectors = torch.linalg.eigh(spread)
        return vectors.flip(1), values.flip(0)
    inner = _waves(stream.width)
    values, vectors = torch.linalg.eigh(inner.T @ spread @ inner)
    equal = torch.full((stream.width, 1), stream.width**-0.5, dtype=torch.float64)
    least = torch.minimum(values[:1], torch.zeros(1, dtype=torch.float64)) if len(values) else torch.zeros(1)
    return torch.cat([inner @ vectors.flip(1), equal], dim=1), torch.cat([values.flip(0), least.double()])


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


def _require_same(expected: list[Tensor], turned: DependencyGraph) -> None:
    """Raise RotationError unless a model computes what is expected on the example, up to rounding; by-products may differ."""
    eps = torch.finfo(torch.float32).eps
    for one, other in zip(expected, _outputs(turned), strict=True):
        error, size = float((one.double() - other.double()).abs().max()), float(one.abs().max())
        if not error <= 4 * math.sqrt(max(torch.finfo(one.dtype).eps, eps)) * max(size, eps):
            raise RotationError(
                f"{type(turned.model).__name__} computes something else after its residual streams were rotated (error "
                f"{error:.1e} of {size:.1e}): something acts on their channels that the graph doesn't show; prune them by another score"
            )


def _outputs(graph: DependencyGraph) -> list[Tensor]:
    program = graph.capture.program
    free = {value.name for name, value in program.outputs.items() if name in program.by_products}
    made = graph.observer().run((graph.args, graph.kwargs))
    return [x for value, x in made if value.name not in free and x.is_floating_point() and x.numel()]


def basis(directions: Tensor, width: int | None, *, centred: bool) -> Tensor:
    """The orthogonal matrix Q [channels, channels] that puts principal `directions` (columns, the first first) on channels.

    `centred`: the last direction is that in which all channels weigh the same, and stays so; see the module's text.
    """
    size = len(directions)
    if not centred:
        return directions
    return directions @ _frame(size, size if width is None else width).T


def _frame(size: int, width: int) -> Tensor:
    """Columns [size, size]: `width - 1` within the first channels, the rest within the others, all but the last of mean zero."""
    last = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    if width >= size or width < 1:
        return torch.cat([_waves(size), last], dim=1)
    rest = size - width
    heights = torch.tensor([math.sqrt(rest / width / size), -math.sqrt(width / rest / size)], dtype=torch.float64)
    between = heights.repeat_interleave(torch.tensor([width, rest]))[:, None]
    blocks = torch.block_diag(_waves(width), _waves(rest))
    return torch.cat([blocks, between, last], dim=1)


def _waves(size: int) -> Tensor:
    """An orthonormal basis [size, size - 1] of what has mean zero: cosines."""
    at = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * math.pi / size
    return math.sqrt(2 / size) * torch.cos(at * torch.arange(1, size, dtype=torch.float64)[None])
