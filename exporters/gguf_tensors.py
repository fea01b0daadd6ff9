"""A Llama-like model as the tensors and numbers of a GGUF file.

llama.cpp reads two architectures of this kind: one whose layers are all alike, and one with head counts and widths per layer.
Both turn neighbouring channels of a head, all of them, divide products by the root of a head's width, and give queries, keys
and values heads of one width; so rows are put in that order, other scales go into the queries, and narrower heads get zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depgraph.errors import ExportError
from exporters.gguf_anatomy import Attention, Decoder, Gated, Matrix, Norm, Turning

ALIKE, PER_LAYER = "llama", "deci"
"""llama.cpp's names of the two architectures."""

BLANK = 32
"""The width of what stands, all zeros, where a layer has none of what the runtime needs there: a multiple of usual blocks."""

_STILL = 1e30
_BASE = 10000.0


@dataclass(frozen=True)
class Weight:
    """A tensor of the file; `source` is the parameter that it is made of."""

    values: Tensor
    source: str


@dataclass(frozen=True)
class Layer:
    """An attention and what follows it; a layer may lack one of them."""

    attention: Attention | None
    gated: Gated | None


@dataclass(frozen=True)
class Shape:
    """The numbers of the file. Where a list has one entry a layer, 0 means that it lacks that part."""

    architecture: str
    width: int
    vocabulary: int
    head_width: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]
    eps: float
    base: float


@dataclass(frozen=True)
class Contents:
    """Everything that a file says about the model; `notes` say what had to be added."""

    shape: Shape
    weights: dict[str, Weight]
    notes: tuple[str, ...]


def contents(decoder: Decoder) -> Contents:
    """The file's tensors, in float32, and numbers.

    Raises:
        ExportError: Its norms divide by different things, or its layers turn heads differently, which no such file can say.
    """
    layers = _layers(decoder)
    attentions = [s for s in decoder.sublayers if isinstance(s, Attention)]
    if not attentions:
        raise ExportError("GGUF's Llama-like models have an attention, this one has none left.")
    turning, head_width = _one_turning(attentions), _head_width(attentions)
    base, factors = _frequencies(turning, head_width)
    alike = all(layer.attention and layer.gated for layer in layers) and len({_sizes(layer) for layer in layers}) == 1
    layers_notes = [] if alike else _missing(layers)
    sizes = [_sizes(layer) if alike else _sizes_with_blanks(number, layer) for number, layer in enumerate(layers)]
    heads, kv_heads, neurons = (tuple(s) for s in zip(*sizes, strict=True))
    vocabulary, width = decoder.table.weight.shape
    shape = Shape(
        ALIKE if alike else PER_LAYER, width, vocabulary, head_width, heads, kv_heads, neurons, _one_eps(decoder), base
    )
    weights = dict(_weights(decoder, layers, shape))
    if factors is not None:
        weights["rope_freqs.weight"] = Weight(factors, "the rotary frequencies")
    return Contents(shape, weights, (*layers_notes, *_widened(attentions, head_width)))


def _layers(decoder: Decoder) -> list[Layer]:
    """Every attention with what is gated right after it."""
    layers: list[Layer] = []
    for part in decoder.sublayers:
        if isinstance(part, Attention):
            layers.append(Layer(part, None))
        elif layers and layers[-1].gated is None:
            layers[-1] = Layer(layers[-1].attention, part)
        else:
            layers.append(Layer(None, part))
    return layers


def _sizes(layer: Layer) -> tuple[int, int, int]:
    heads, kv_heads = (layer.attention.heads, layer.attention.kv_heads) if layer.attention else (0, 0)
    return heads, kv_heads, layer.gated.gate.weight.shape[0] if layer.gated else 0


def _sizes_with_blanks(number: int, layer: Layer) -> tuple[int, int, int]:
    """With one head where the first layer has no attention, whose numbers llama.cpp takes for all; and blank neurons.

    Where a layer ends with its attention, llama.cpp would pass over what that adds.
    """
    heads, kv_heads, neurons = _sizes(layer)
    if not heads and number == 0:
        heads = kv_heads = 1
    return heads, kv_heads, neurons or BLANK


def _missing(layers: Sequence[Layer]) -> list[str]:
    notes = []
    if layers[0].attention is None:
        notes.append("layer 0 has an attention of one head, all zeros, as llama.cpp reads a head's width there")
    blank = [str(number) for number, layer in enumerate(layers) if layer.gated is None]
    if blank:
        notes.append(
            f"layers {', '.join(blank)} have {BLANK} neurons, all zeros, as llama.cpp passes over layers without any"
        )
    return notes


def _widened(attentions: Sequence[Attention], head_width: int) -> list[str]:
    narrow = sorted({w for a in attentions for w in (a.width, a.value_width) if w != head_width})
    if not narrow:
        return []
    return [
        f"heads of {', '.join(map(str, narrow))} channels are filled up with zeros to {head_width}, the same for all"
    ]


def _one_eps(decoder: Decoder) -> float:
    found = {s.norm.eps for s in decoder.sublayers} | {decoder.norm.eps}
    if len(found) > 1:
        raise ExportError(
            f"GGUF holds one eps for all norms, this model has {', '.join(f'{e:g}' for e in sorted(found))}."
        )
    return found.pop()


def _one_turning(attentions: Sequence[Attention]) -> Turning:
    first = attentions[0]
    for other in attentions[1:]:
        mine, theirs = (torch.tensor(a.turning.angles) for a in (first, other))
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-4, atol=0):
            raise ExportError(
                f"GGUF holds one list of rotary frequencies for all layers, but {other.q.name!r} is turned by others than "
                f"{first.q.name!r}: plan with scope='uniform', or protect the rotary pairs."
            )
    return first.turning


def _head_width(attentions: Sequence[Attention]) -> int:
    """The width of all heads in the file: the largest, even."""
    widths = [w for a in attentions for w in (a.value_width, 2 * len(_slots(a.turning, a.width)))]
    return max(widths) + max(widths) % 2


def _slots(turning: Turning, width: int) -> list[tuple[int | None, int | None]]:
    """The channels of a head, two by two, in the file's order: those that turn together first."""
    turned = {channel for pair in turning.pairs for channel in pair}
    still: list[int | None] = [channel for channel in range(width) if channel not in turned]
    still += [None] * (len(still) % 2)
    return [*turning.pairs, *zip(still[::2], still[1::2], strict=True)]


def _frequencies(turning: Turning, head_width: int) -> tuple[float, Tensor | None]:
    """The base of the geometric series of frequencies, and what each is divided by, if anything."""
    slots = torch.arange(head_width // 2, dtype=torch.float64)
    angles = torch.tensor(turning.angles, dtype=torch.float64)
    last = len(angles) - 1
    base = float(f"{float(angles[-1]) ** (-head_width / (2 * last)):.6g}") if last > 0 else _BASE
    for candidate in (_BASE, base):
        series = candidate ** (-2 * slots / head_width)
        if len(angles) == len(series) and torch.allclose(series, angles, rtol=1e-5, atol=0):
            return candidate, None
    factors = torch.full((head_width // 2,), _STILL, dtype=torch.float64)
    factors[: len(angles)] = _BASE ** (-2 * slots[: len(angles)] / head_width) / angles
    return _BASE, factors.float()


def _weights(decoder: Decoder, layers: Sequence[Layer], shape: Shape) -> Iterator[tuple[str, Weight]]:
    yield "token_embd.weight", Weight(decoder.table.weight, decoder.table.name)
    for number, layer in enumerate(layers):
        place = f"blk.{number}"
        if shape.heads[number]:
            yield from _attention_weights(place, layer.attention, shape)
        yield from _gated_weights(place, layer.gated, shape)
    yield from _norm_weight("output_norm", decoder.norm)
    if not decoder.tied:
        yield "output.weight", Weight(decoder.head.weight, decoder.head.name)
    if decoder.head.bias is not None:
        raise ExportError(f"GGUF's Llama-like models have no bias at their head: {decoder.head.name!r} has one.")


def _norm_weight(place: str, norm: Norm | None, width: int = 0) -> Iterator[tuple[str, Weight]]:
    yield f"{place}.weight", Weight(torch.ones(width) if norm is None else norm.weight, "a norm")


def _attention_weights(place: str, found: Attention | None, shape: Shape) -> Iterator[tuple[str, Weight]]:
    yield from _norm_weight(f"{place}.attn_norm", None if found is None else found.norm, shape.width)
    if found is None:
        for name in ("attn_q", "attn_k", "attn_v"):
            yield f"{place}.{name}.weight", Weight(torch.zeros(shape.head_width, shape.width), "nothing")
        yield f"{place}.attn_output.weight", Weight(torch.zeros(shape.width, shape.head_width), "nothing")
        return
    order = [channel for slot in _slots(found.turning, found.width) for channel in slot]
    plain = list[int | None](range(found.value_width))
    scale = found.scale * math.sqrt(shape.head_width)
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    yield from _matrix(f"{place}.attn_q", _ordered(found.q, found.heads, order, shape.head_width), scale)
    yield from _matrix(f"{place}.attn_k", _ordered(found.k, found.kv_heads, order, shape.head_width))
    yield from _matrix(f"{place}.attn_v", _ordered(found.v, found.kv_heads, plain, shape.head_width))
    out = _ordered_rows(found.out.weight.T, found.heads, plain, shape.head_width).T
    yield from _matrix(
        f"{place}.attn_output", Matrix(found.out.node, found.out.data, out, found.out.bias, found.out.name)
    )


def _gated_weights(place: str, found: Gated | None, shape: Shape) -> Iterator[tuple[str, Weight]]:
    yield from _norm_weight(f"{place}.ffn_norm", None if found is None else found.norm, shape.width)
    if found is None:
        for name, size in (
            ("gate", (BLANK, shape.width)),
            ("up", (BLANK, shape.width)),
            ("down", (shape.width, BLANK)),
        ):
            yield f"{place}.ffn_{name}.weight", Weight(torch.zeros(size), "nothing")
        return
    for name, matrix in (("gate", found.gate), ("up", found.up), ("down", found.down)):
        yield from _matrix(f"{place}.ffn_{name}", matrix)


def _matrix(place: str, matrix: Matrix, scale: float = 1.0) -> Iterator[tuple[str, Weight]]:
    yield f"{place}.weight", Weight(matrix.weight * scale if scale != 1 else matrix.weight, matrix.name)
    if matrix.bias is not None:
        yield f"{place}.bias", Weight(matrix.bias * scale, f"the bias beside {matrix.name}")


def _ordered(matrix: Matrix, heads: int, order: Sequence[int | None], width: int) -> Matrix:
    bias = None if matrix.bias is None else _ordered_rows(matrix.bias, heads, order, width)
    return Matrix(matrix.node, matrix.data, _ordered_rows(matrix.weight, heads, order, width), bias, matrix.name)


def _ordered_rows(rows: Tensor, heads: int, order: Sequence[int | None], width: int) -> Tensor:
    """Rows [heads * channels, ...] with the channels of each head in this order, zeros where it says None and up to `width`."""
    split = rows.unflatten(0, (heads, -1))
    made = split.new_zeros((heads, width, *split.shape[2:]))
    for place, channel in enumerate(order):
        if channel is not None:
            made[:, place] = split[:, channel]
    return made.flatten(0, 1)


def as_array(weight: Weight) -> np.ndarray:
    """Its values as numpy has them, in float32."""
    return np.ascontiguousarray(weight.values.detach().cpu().float().numpy())
