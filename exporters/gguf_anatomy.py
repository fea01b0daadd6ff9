"""What a Llama-like model is made of, found by what its parts do: norms, attentions, gated layers, head.

Nothing is known of names or classes. Which matrix makes queries, keys or values, how heads lie in them, how positions turn
them, what a norm divides by and which activation gates is all read off what the parts answer to chosen values; an answer that
Llama would not give is refused, with the matrix that it concerns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from depgraph.errors import ExportError
from exporters.gguf_gaps import Gaps, Matrix, shape_of

_NEAR = 1e-3
_LIKE = "GGUF is written for Llama-like models only"


@dataclass(frozen=True)
class Norm:
    """x * weight / sqrt(mean(x²) + eps)."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Turning:
    """How positions turn the channels of a head: channel `pairs[k]` by `angles[k]` radians a position; others not at all."""

    pairs: tuple[tuple[int, int], ...]
    angles: tuple[float, ...]


@dataclass(frozen=True)
class Attention:
    """An attention with its norm. `scale` is what the products of queries and keys are multiplied by."""

    norm: Norm
    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    heads: int
    kv_heads: int
    turning: Turning
    scale: float

    @property
    def width(self) -> int:
        """Channels of a query head."""
        return self.q.weight.shape[0] // self.heads

    @property
    def value_width(self) -> int:
        """Channels of a value head."""
        return self.v.weight.shape[0] // self.kv_heads


@dataclass(frozen=True)
class Gated:
    """down(silu(gate(x)) * up(x)) with its norm."""

    norm: Norm
    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Decoder:
    """A Llama-like model: what it adds to the stream, in order; `tied` says whether the head is the embedding's table."""

    table: Matrix
    sublayers: tuple[Attention | Gated, ...]
    norm: Norm
    head: Matrix
    tied: bool


def decoder(gaps: Gaps) -> Decoder:
    """The parts of a Llama-like model.

    Raises:
        ExportError: It isn't one; the message says which part isn't Llama's.
    """
    groups, head = _groups(gaps)
    stream, sublayers = [gaps.table.node], list[Attention | Gated]()
    for readers, writer in groups:
        norm = _norm(gaps, readers[0], stream)
        sublayers.append(_KINDS[len(readers)](gaps, norm, readers, writer))
        stream.append(writer.node)
    norm = _norm(gaps, head, stream)
    given = torch.randn(shape_of(head.node), generator=_generator())
    if not _same(gaps.run(gaps.output(), {head.node: given}), given):
        raise ExportError(f"{_LIKE}: what {head.name!r} gives is changed (scaled or capped) before it is put out.")
    tied = head.name == gaps.table.name or head.weight.data_ptr() == gaps.table.weight.data_ptr()
    return Decoder(gaps.table, tuple(sublayers), norm, head, tied)


def _groups(gaps: Gaps) -> tuple[list[tuple[list[Matrix], Matrix]], Matrix]:
    """The matrices that read the stream together, each with the one that writes to it; and the head."""
    stream, readers, groups = {gaps.table.node}, list[Matrix](), list[tuple[list[Matrix], Matrix]]()
    for matrix in gaps.matrices:
        sources = gaps.sources(matrix.data)
        if gaps.table.node in sources:
            if sources != stream or any(r.data is not matrix.data for r in readers):
                raise ExportError(
                    f"{_LIKE}: {matrix.name!r} doesn't read all that was added before it (parallel branches?)."
                )
            readers.append(matrix)
        elif sources == {r.node for r in readers} and len(readers) in _KINDS:
            groups.append((readers, matrix))
            stream, readers = {*stream, matrix.node}, []
        else:
            fed = ", ".join(repr(m.name) for m in gaps.matrices if m.node in sources)
            raise ExportError(
                f"{_LIKE}, where three matrices make queries, keys and values, two a gated layer: {matrix.name!r} gets {fed}."
            )
    if len(readers) != 1 or readers[0].node not in gaps.sources(gaps.output()):
        raise ExportError(f"{_LIKE}: its last matrix isn't the only one that reads the last norm and makes the output.")
    return groups, readers[0]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def _drawn(nodes: Sequence[Node]) -> list[Tensor]:
    generator = _generator()
    return [torch.randn(shape_of(node), generator=generator) for node in nodes]


def _same(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return False
    return bool((actual - expected).abs().max() <= _NEAR * expected.abs().max())


def _norm(gaps: Gaps, reader: Matrix, stream: Sequence[Node]) -> Norm:
    """The RMS norm between the stream and what reads it."""
    drawn = _drawn(stream)
    one = drawn[0] / drawn[0].pow(2).mean(-1, keepdim=True).sqrt()
    silent = [torch.zeros_like(d) for d in drawn[1:]]
    answered = [gaps.run(reader.data, dict(zip(stream, [one * size, *silent], strict=True))) for size in (1.0, 1e-4)]
    ratio = float((answered[1] / 1e-4 / answered[0]).double().pow(2).median())
    eps = float(f"{max(0.0, (1 - ratio * 1e-8) / (ratio - 1)):.4g}") if ratio > 1 else 0.0
    probed = (answered[0] / one).flatten(0, -2).median(0).values * math.sqrt(1 + eps)
    weight = next((v for v in gaps.vectors(reader.data, stream, len(probed)) if _same(v, probed)), probed).detach()
    total = torch.stack(drawn).sum(0)
    expected = total * weight * (total.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    if not _same(gaps.run(reader.data, dict(zip(stream, drawn, strict=True))), expected):
        raise ExportError(
            f"{_LIKE}: what {reader.name!r} reads isn't an RMS norm of the embedding plus all that was added to it (LayerNorm, "
            "learned positions, or a scaled stream?)."
        )
    return Norm(weight, eps)


def _gated(gaps: Gaps, norm: Norm, readers: Sequence[Matrix], writer: Matrix) -> Gated:
    """Which of two matrices gates, by trying both."""
    a, b = _drawn([m.node for m in readers])
    answered = gaps.run(writer.data, {readers[0].node: a, readers[1].node: b})
    first, second = readers
    for gate, up, x, y in ((first, second, a, b), (second, first, b, a)):
        if _same(answered, F.silu(x) * y):
            return Gated(norm, gate, up, writer)
        for name, other in _ACTIVATIONS.items():
            if _same(answered, other(x) * y):
                raise ExportError(f"{_LIKE}, which gate by SiLU: {gate.name!r} gates by {name}.")
    raise ExportError(f"{_LIKE}: {writer.name!r} gets no SiLU of one matrix times another.")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": F.gelu,
    "GELU (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "ReLU": F.relu,
    "squared ReLU": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "nothing": lambda x: x,
}


class _Attending:
    """One attention's gap, to put questions to: three values in, what its last matrix reads out."""

    def __init__(self, gaps: Gaps, readers: Sequence[Matrix], writer: Matrix) -> None:
        self.gaps, self.readers, self.writer = gaps, list(readers), writer
        self.drawn = {m.node: d for m, d in zip(readers, _drawn([m.node for m in readers]), strict=True)}
        self.usual = self.answer({})

    def answer(self, changed: dict[Node, Tensor]) -> Tensor:
        """What comes out when some of the drawn values are these."""
        return self.gaps.run(self.writer.data, self.drawn | changed)

    def moved(self, matrix: Matrix, position: slice, channel: slice) -> Tensor:
        """Which places of the answer [positions, channels] change with these of one matrix."""
        other = self.drawn[matrix.node].clone()
        other[:, position, channel] += 3.0
        return ((self.answer({matrix.node: other}) - self.usual).abs() > 1e-6).any(0)


_ALL = slice(None)


def _attention(gaps: Gaps, norm: Norm, readers: Sequence[Matrix], writer: Matrix) -> Attention:
    asked = _Attending(gaps, readers, writer)
    if asked.usual.dim() != 3 or asked.usual.shape[1] < 3:
        raise ExportError("GGUF needs example token ids of shape [batch, length] with 3 tokens or more.")
    q, k, v = _roles(asked)
    rows, width = [m.weight.shape[0] for m in (q, k, v)], _head_width(asked, q)
    heads, kv_heads = (n // max(width, 1) for n in (asked.usual.shape[-1], rows[2]))
    if not width or heads * width != asked.usual.shape[-1] or rows[0] % heads or rows[1] * heads != rows[0] * kv_heads:
        raise ExportError(f"{_LIKE}, whose heads are alike and lie side by side: those of {q.name!r} don't.")
    turning = _turning(asked, q, (k, v), heads)
    found = Attention(norm, q, k, v, writer, heads, kv_heads, turning, _scale(asked, (q, k, v), heads, turning))
    expected = attended(asked.drawn[q.node], asked.drawn[k.node], asked.drawn[v.node], found)
    if not _same(asked.usual, expected):
        raise ExportError(
            f"{_LIKE}: {writer.name!r} gets something else than causal softmax attention with rotary positions (norms of "
            "queries or keys, sinks, caps, another way of positions, or a mask among the inputs?)."
        )
    return found


def _roles(asked: _Attending) -> tuple[Matrix, Matrix, Matrix]:
    """Queries, keys and values: doubled values double the answer, and a position's query moves no other position."""
    doubled = [m for m in asked.readers if _same(asked.answer({m.node: 2 * asked.drawn[m.node]}), 2 * asked.usual)]
    rest = [m for m in asked.readers if m not in doubled]
    queries = [m for m in rest if not asked.moved(m, slice(1, 2), _ALL)[2:].any()]
    if len(doubled) != 1 or len(queries) != 1:
        raise ExportError(
            f"{_LIKE}: {', '.join(repr(m.name) for m in asked.readers)} aren't one matrix each for queries, keys and values."
        )
    (key,) = [m for m in rest if m not in queries]
    if any(asked.moved(m, slice(-1, None), _ALL)[:-1].any() for m in (key, doubled[0])):
        raise ExportError(
            f"{_LIKE}, which look back only: in the attention of {key.name!r} a token sees those after it."
        )
    return queries[0], key, doubled[0]


def _head_width(asked: _Attending, q: Matrix) -> int:
    """Columns of the answer that the first channel of the queries moves; 0 where they aren't the first ones."""
    moved = asked.moved(q, _ALL, slice(0, 1)).any(0)
    width = int(moved.sum())
    return width if moved[:width].all() else 0


def _turning(asked: _Attending, q: Matrix, others: Sequence[Matrix], heads: int) -> Turning:
    """How positions turn queries, from where the second position leaves each channel of a head."""
    node = asked.gaps.alone(q.node, [m.node for m in others])
    width = q.weight.shape[0] // heads
    columns = []
    for channel in range(width):
        given = torch.zeros_like(asked.drawn[q.node])
        given[..., channel::width] = 1.0
        made = asked.gaps.run(node, {q.node: given})
        place = next((d for d in (-2, -3) if made.dim() >= 3 and made.shape[d] == given.shape[1]), None)
        if place is None or made.shape[-1] != width:
            raise ExportError(f"{_LIKE}: how positions turn the queries of {q.name!r} can't be seen.")
        columns.append(made.movedim(place, 0).reshape(given.shape[1], -1, width)[:2, 0])
    start, turned = torch.stack(columns, -1).double()
    if not _same(start, start[0, 0] * torch.eye(width, dtype=start.dtype)) or not start[0, 0]:
        raise ExportError(f"{_LIKE}: the queries of {q.name!r} aren't turned by their positions, counted from 0.")
    return _pairs(turned / start[0, 0])


def _pairs(turned: Tensor) -> Turning:
    """The pairs of channels that a rotation [channels, channels] turns, and by how much."""
    pairs, angles = [], []
    for channel, column in enumerate(turned.T):
        rest = column.clone()
        rest[channel] = 0
        partner = int(rest.abs().argmax())
        if rest[partner] > 0:
            pairs.append((channel, partner))
            angles.append(math.atan2(float(rest[partner]), float(column[channel])))
    return Turning(tuple(pairs), tuple(angles))


def _scale(asked: _Attending, roles: Sequence[Matrix], heads: int, turning: Turning) -> float:
    """What products of queries and keys are multiplied by, from how the second position shares itself out between two."""
    q, k, v = (torch.zeros_like(asked.drawn[m.node]) for m in roles)
    width, slowest = q.shape[-1] // heads, min(zip(turning.angles, turning.pairs, strict=True), default=(0.0, (0, 0)))
    channel = slowest[1][0]
    q[:, 1, channel::width] = 1.0
    k[:, 0, channel::width] = 8.0
    v[:, 0] = 1.0
    share = asked.answer({m.node: value for m, value in zip(roles, (q, k, v), strict=True)})[0, 1, 0].double()
    scale = float(torch.log(share / (1 - share))) / (8.0 * math.cos(slowest[0]))
    usual = 1 / math.sqrt(width)
    return usual if abs(scale / usual - 1) < 1e-4 else scale


def attended(q: Tensor, k: Tensor, v: Tensor, like: Attention) -> Tensor:
    """What Llama's attention makes of queries, keys and values [batch, length, channels]."""
    split = [
        x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, like.heads), (k, like.kv_heads), (v, like.kv_heads))
    ]
    queries, keys = (_turned(x, like.turning) for x in split[:2])
    keys, values = (x.repeat_interleave(like.heads // like.kv_heads, 1) for x in (keys, split[2]))
    made = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=like.scale)
    return made.transpose(1, 2).flatten(2)


def _turned(x: Tensor, turning: Turning) -> Tensor:
    """Heads [batch, heads, length, channels], each position turned."""
    if not turning.pairs:
        return x
    first, second = (list(side) for side in zip(*turning.pairs, strict=True))
    angles = torch.arange(x.shape[2])[:, None] * torch.tensor(turning.angles)
    made = x.clone()
    made[..., first] = x[..., first] * angles.cos() - x[..., second] * angles.sin()
    made[..., second] = x[..., first] * angles.sin() + x[..., second] * angles.cos()
    return made


_KINDS: dict[int, Callable[[Gaps, Norm, Sequence[Matrix], Matrix], Attention | Gated]] = {2: _gated, 3: _attention}
