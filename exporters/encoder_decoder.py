"""A model of encoder and decoder as two graphs: one run of the first gives what each token of the second looks back on."""

from __future__ import annotations

import copy
import inspect
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.capture.restoring import restored
from depgraph.errors import ExportError
from depgraph.storage import appearing, free_folder
from exporters import greedy
from exporters.caching import Around, CacheEntry, Pair, cache_entries, filled, on_device, pairs_of, probed
from exporters.feeds import run
from exporters.model_state import preserved
from exporters.onnx_check import open_session, tolerance_for
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
MASK = "attention_mask"

_PAST, _NEW = 4, 3
_DEFAULTS = OnnxOptions()

Layers = dict[str, dict[str, Pair]]
"""By the layer's number: what its own attention keeps ("decoder") and what it took from the encoder ("encoder")."""


@dataclass(frozen=True)
class EncoderDecoderReport:
    """Two files, and how they were seen to generate.

    Attributes:
        encoder: The report of `encoder.onnx`.
        decoder: The report of `decoder.onnx`.
        agreement: Greedy tokens of both in ONNX Runtime against `generate()`.
        start: The token that the decoder starts with.
        notes: What one should know.
        seconds: The whole export took.
    """

    path: Path
    encoder: OnnxReport
    decoder: OnnxReport
    agreement: greedy.Agreement
    start: int
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        notes = "".join(f" Note: {note}." for note in self.notes)
        return (
            f"Wrote {self.path} ({ENCODER} {self.encoder.bytes:,} bytes, {DECODER} {self.decoder.bytes:,} bytes, opset "
            f"{self.encoder.opset}) in {self.seconds:.1f} s. In ONNX Runtime {self.agreement}; logits differ by "
            f"{self.agreement.difference.absolute:.2g} ({self.agreement.difference.relative:.2g} of the largest).{notes}"
        )


@dataclass(frozen=True)
class Memory:
    """What the decoder keeps: its own entries, those from the encoder, and the encoder's output as the latter are made of it."""

    own: tuple[CacheEntry, ...]
    cross: tuple[CacheEntry, ...]
    width: int
    length: int
    start: int

    def joined(self, own: list[Pair], cross: list[Pair]) -> Layers:
        """Both by layer; either may be left out."""
        found: Layers = {number: {} for number in self._numbers().values()}
        for kind, entries, pairs in (("decoder", self.own, own), ("encoder", self.cross, cross)):
            for entry, pair in zip(entries, pairs, strict=True) if pairs else ():
                found[self._numbers()[entry.layer]][kind] = pair
        return found

    def cache(self, layers: Layers) -> Any:
        """A cache that holds them; the encoder's part isn't computed again."""
        from transformers import EncoderDecoderCache

        own = filled(self.own, [layers[self._numbers()[entry.layer]]["decoder"] for entry in self.own])
        cross = filled(self.cross, [layers[self._numbers()[entry.layer]]["encoder"] for entry in self.cross])
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated.update({entry.layer: True for entry in self.cross})
        return cache

    def _numbers(self) -> dict[int, str]:
        """The file's number of each layer that keeps anything."""
        layers = sorted({entry.layer for entry in (*self.own, *self.cross)})
        return {layer: str(number) for number, layer in enumerate(layers)}


class EncoderPart(Around):
    """The model as a function of its encoder's inputs: the encoder's output, and the keys and values made of it."""

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        super().__init__(model)
        self._memory = memory

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        """`last_hidden_state` and `present.N.encoder.key` and `.value`."""
        first = next(iter(inputs.values()))
        start = torch.full((first.shape[0], 1), self._memory.start, dtype=torch.long, device=first.device)
        output = self.model(**inputs, decoder_input_ids=start, use_cache=True)
        pairs = pairs_of(self._memory.cross, output.past_key_values.cross_attention_cache)
        return {"last_hidden_state": output.encoder_last_hidden_state, "present": self._memory.joined([], pairs)}


class DecoderPart(Around):
    """The model as a function of new tokens and all that was kept: logits, and what its own attentions keep then."""

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        super().__init__(model)
        self._memory = memory

    def forward(self, input_ids: Tensor, past_key_values: Layers, encoder_attention_mask: Tensor | None = None) -> Any:
        """Logits [batch, sequence, vocabulary] and `present.N.decoder.key` and `.value`."""
        first = next(layer["encoder"] for layer in past_key_values.values() if "encoder" in layer)["key"]
        # the decoder looks at the shape of the encoder's output only, as its keys and values are there
        hidden = first.new_zeros(first.shape[0], first.shape[2], self._memory.width)
        mask = {} if encoder_attention_mask is None else {MASK: encoder_attention_mask}
        cache = self._memory.cache(past_key_values)
        output = self.model(
            encoder_outputs=(hidden,), decoder_input_ids=input_ids, past_key_values=cache, use_cache=True, **mask
        )
        pairs = pairs_of(self._memory.own, output.past_key_values.self_attention_cache)
        return {"logits": output.logits, "present": self._memory.joined(pairs, [])}


def to_encoder_decoder_onnx(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    options: OnnxOptions = _DEFAULTS,
    new_tokens: int = greedy.NEW_TOKENS,
) -> EncoderDecoderReport:
    """Export an encoder-decoder of transformers as two files, and prove that they generate as `generate()` does.

    `encoder.onnx` takes the encoder's inputs by their names and gives `last_hidden_state` and, for each layer,
    `present.N.encoder.key` and `.value` [batch, heads, encoder_sequence, width]. `decoder.onnx` takes `input_ids` [batch,
    sequence], those as `past_key_values.N.encoder.key` and `.value` every time, `past_key_values.N.decoder.key` and `.value`
    [batch, heads, past_sequence, width], empty at first, and `encoder_attention_mask` [batch, encoder_sequence] where `inputs`
    holds an `attention_mask`, or token ids for which the model's forward takes one; it gives `logits` and
    `present.N.decoder.key` and `.value`. Whatever a class's own
    `generate()` does around the greedy search (a task's prompt, forbidden tokens) is left to the caller.

    Args:
        inputs: What the encoder takes, by name, [batch, ...] each, as the user would give it, masks included. The batch
            stays free, and the length of token ids and masks; other sizes are those of the example.
        folder: Where to; it must not exist or be empty.

    Raises:
        ExportError: The model is none of this kind, its cache isn't keys and values only, or as `to_onnx`; or its tokens
            differ. No folder is left.
        CheckpointError: The folder can't be written or isn't empty.
    """
    started = time.perf_counter()
    path = free_folder(folder, "never")
    if not isinstance(model, nn.Module):
        raise ExportError(f"to_encoder_decoder_onnx takes a torch.nn.Module, not a {type(model).__name__}.")
    subject = copy.deepcopy(model).float() if options.dtype == "float32" else model
    with appearing(path) as draft, restored(subject), preserved(subject), torch.no_grad():
        subject.eval()
        given = on_device(subject, **with_mask(subject, inputs))
        memory = remembered(subject, given)
        expected, said = _generated(subject, given, new_tokens, memory.start)
        encoder = to_onnx(EncoderPart(subject, memory), (), draft / ENCODER, given, _free(given), options=options)
        example, free = _decoder_example(memory, given)
        decoder = to_onnx(DecoderPart(subject, memory), (), draft / DECODER, example, free, options=options)
        got = _decoded(draft, memory, given, new_tokens)
        agreement = greedy.agreement(expected, got, tolerance_for(memory.own[0].dtype, options.rtol, options.atol))
    return EncoderDecoderReport(
        path,
        replace(encoder, path=path / ENCODER),
        replace(decoder, path=path / DECODER),
        agreement,
        memory.start,
        tuple(dict.fromkeys((*said, *encoder.notes, *decoder.notes))),
        time.perf_counter() - started,
    )


def with_mask(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, and a mask of ones for token ids without one, where the model's forward takes it: for texts of several lengths."""
    ids = next((tensor for tensor in inputs.values() if _is_text(tensor)), None)
    if ids is None or MASK in inputs or MASK not in inspect.signature(model.forward).parameters:
        return dict(inputs)
    return {**inputs, MASK: torch.ones_like(ids, dtype=torch.long)}


def remembered(model: nn.Module, inputs: Mapping[str, Tensor]) -> Memory:
    """What the decoder keeps of these inputs, seen in one forward.

    Raises:
        ExportError: The model has no encoder and decoder with such a cache, or says no token to start with.
    """
    from transformers import EncoderDecoderCache

    owner = type(model).__name__
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{owner} is no encoder-decoder of transformers: export it with to_decoder_onnx or to_onnx.")
    if not inputs:
        raise ExportError(f"`inputs` is empty; give what the encoder of {owner} takes, by name.")
    start = _start(model, owner)
    first = next(iter(inputs.values()))
    tokens = torch.full((first.shape[0], 1), start, dtype=torch.long, device=first.device)
    output = probed(model, {**inputs, "decoder_input_ids": tokens})
    cache, hidden = output.past_key_values, output.encoder_last_hidden_state
    if not isinstance(cache, EncoderDecoderCache) or hidden is None:
        raise ExportError(
            f"{owner} keeps {type(cache).__name__}, not keys and values of encoder and decoder: use to_onnx."
        )
    own = cache_entries(cache.self_attention_cache, f"the decoder of {owner}")
    cross = cache_entries(cache.cross_attention_cache, f"the decoder of {owner}")
    return Memory(own, cross, hidden.shape[2], hidden.shape[1], start)


def _generated(
    model: nn.Module, inputs: Mapping[str, Tensor], count: int, start: int
) -> tuple[greedy.Decoded, tuple[str, ...]]:
    """Greedy tokens of `generate()`, and a note where it works only with a cache that grows by itself.

    transformers makes the cache by one number of layers in the config, which may be the encoder's: a decoder that is deeper,
    as a cut of the encoder's depth leaves it, finds no place in it.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    try:
        return greedy.in_torch(model, inputs, count, start), ()
    except ExportError as error:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        try:
            found = greedy.in_torch(model, {**inputs, "past_key_values": cache}, count, start)
        except ExportError:
            raise error from None
    note = f"generate() of {type(model).__name__} fails with the cache that it makes for itself, but not with one that grows"
    return found, (f"{note}: give it past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())",)


def _start(model: Any, owner: str) -> int:
    settings = [getattr(model, "generation_config", None), model.config]
    names = ("decoder_start_token_id", "bos_token_id")
    found = (getattr(place, name, None) for name in names for place in settings)
    start = next((value for value in found if isinstance(value, int)), None)
    if start is None:
        raise ExportError(f"{owner} says no token to start with: set model.generation_config.decoder_start_token_id.")
    return start


def _is_text(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point()


def _free(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    return {n: {0: "batch", 1: "encoder_sequence"} if _is_text(t) else {0: "batch"} for n, t in inputs.items()}


def _decoder_example(memory: Memory, inputs: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Inputs to trace the decoder with, and which of their sizes are free."""
    first = next(iter(inputs.values()))
    batch, device = max(2, first.shape[0]), first.device
    own = [entry.random(batch, _PAST, device) for entry in memory.own]
    cross = [entry.random(batch, memory.length, device) for entry in memory.cross]
    layers = memory.joined(own, cross)
    lengths = {"decoder": {2: "past_sequence"}, "encoder": {}}
    if any(map(_is_text, inputs.values())):
        lengths["encoder"] = {2: "encoder_sequence"}
    free_layers = {
        number: {kind: {name: {0: "batch", **lengths[kind]} for name in pair} for kind, pair in layer.items()}
        for number, layer in layers.items()
    }
    tokens = (torch.arange(batch * _NEW).view(batch, _NEW) % 3).to(device)
    example: dict[str, Any] = {"input_ids": tokens}
    free: dict[str, Any] = {"input_ids": {0: "batch", 1: "sequence"}}
    if MASK in inputs:
        example["encoder_attention_mask"] = torch.ones(batch, memory.length, dtype=torch.long, device=device)
        free["encoder_attention_mask"] = {0: "batch", 1: "encoder_sequence"}
    return {**example, "past_key_values": layers}, {**free, "past_key_values": free_layers}


def _decoded(folder: Path, memory: Memory, inputs: Mapping[str, Tensor], count: int) -> greedy.Decoded:
    """Greedy tokens of both files."""
    encoder, decoder = (open_session(folder / name, torch.get_num_threads()) for name in (ENCODER, DECODER))
    taken = {value.name for value in encoder.get_inputs()}
    arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
    made = run(encoder, {name: array for name, array in arrays.items() if name in taken}, ENCODER)
    outputs = dict(zip([value.name for value in encoder.get_outputs()], made, strict=True))
    batch = len(next(iter(arrays.values())))
    feeds = {"input_ids": torch.full((batch, 1), memory.start).numpy()}
    if MASK in arrays and "encoder_attention_mask" in {value.name for value in decoder.get_inputs()}:
        feeds["encoder_attention_mask"] = arrays[MASK]
    own = [entry.random(batch, 0, torch.device("cpu")) for entry in memory.own]
    for number, layer in memory.joined(own, []).items():
        for name, tensor in layer.get("decoder", {}).items():
            feeds[f"past_key_values.{number}.decoder.{name}"] = tensor.numpy()
    cross = {name: array for name, array in outputs.items() if name.startswith("present.")}
    feeds |= {f"past_key_values.{name.partition('.')[2]}": array for name, array in cross.items()}
    return greedy.in_onnx(decoder, feeds, count)
