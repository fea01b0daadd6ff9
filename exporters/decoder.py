"""A language model as one graph for prompt and single tokens, with its key-value cache as inputs and outputs."""

from __future__ import annotations

import copy
import inspect
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph.capture.restoring import restored
from depgraph.errors import ExportError
from exporters import greedy, onnx_file
from exporters.caching import Around, CacheEntry, Pair, cache_entries, filled, on_device, pairs_of, probed
from exporters.feeds import dtype_of
from exporters.model_state import preserved
from exporters.onnx_check import open_session, tolerance_for
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx

_BATCH, _PAST, _NEW = 2, 7, 3
_CACHE = "past_key_values."
_DEFAULTS = OnnxOptions()


@dataclass(frozen=True)
class DecoderReport:
    """A decoder's file, and how it was seen to generate.

    Attributes:
        onnx: The file, and how single runs of it agree with PyTorch.
        cache: What each entry `past_key_values.N` holds, in order.
        agreement: Greedy tokens in ONNX Runtime against `generate()`.
        notes: What one should know.
        seconds: The whole export took.
    """

    onnx: OnnxReport
    cache: tuple[CacheEntry, ...]
    agreement: greedy.Agreement
    notes: tuple[str, ...]
    seconds: float

    @property
    def path(self) -> Path:
        """The file."""
        return self.onnx.path

    def __str__(self) -> str:
        heads = ", ".join(str(entry.heads) for entry in self.cache)
        notes = "".join(f" Note: {note}." for note in self.notes)
        return (
            f"Wrote {self.path} ({self.onnx.bytes:,} bytes, opset {self.onnx.opset}) in {self.seconds:.1f} s, with a cache of "
            f"{len(self.cache)} layers (heads {heads}). In ONNX Runtime {self.agreement}; logits differ by "
            f"{self.agreement.difference.absolute:.2g} ({self.agreement.difference.relative:.2g} of the largest).{notes}"
        )


class CachedDecoder(Around):
    """The model as a function of tokens and the cache's tensors, that returns logits and the longer cache."""

    def __init__(self, model: nn.Module, entries: Sequence[CacheEntry]) -> None:
        super().__init__(model)
        self._entries = tuple(entries)

    def forward(self, past_key_values: list[Pair], **inputs: Tensor) -> dict[str, Any]:
        """Logits [batch, sequence, vocabulary] of the new tokens, and `present`, the cache with those added."""
        output = self.model(**inputs, past_key_values=filled(self._entries, past_key_values), use_cache=True)
        return {"logits": output.logits, "present": pairs_of(self._entries, output.past_key_values)}


def to_decoder_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    prompt: Tensor | None = None,
    *,
    options: OnnxOptions = _DEFAULTS,
    new_tokens: int = greedy.NEW_TOKENS,
) -> DecoderReport:
    """Export a causal language model of transformers with its cache, and prove that it generates as `generate()` does.

    The file takes `input_ids` [batch, sequence], `attention_mask` [batch, past_sequence + sequence], `position_ids`
    [batch, sequence] (where the model takes positions) and `past_key_values.N.key` and `.value`, [batch, heads,
    past_sequence, width], empty for a prompt; it gives `logits` [batch, sequence, vocabulary] and `present.N.key` and
    `.value`. N counts the layers that have a cache, and heads are those each layer has. All states are kept also where a
    layer looks back a window only: its mask then does the forgetting.

    Args:
        prompt: Token ids [batch, length] to prove it with, in at least three rows padded on the left to different
            lengths; None: random ones.
        options: As for `to_onnx`; `constants` means nothing here.
        new_tokens: How many tokens are compared for each row.

    Raises:
        ExportError: The model is no decoder whose cache is keys and values, or as `to_onnx`; or its tokens differ. No file
            is left, one that was there stays.
    """
    started = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise ExportError(f"to_decoder_onnx takes a torch.nn.Module, not a {type(model).__name__}.")
    subject = copy.deepcopy(model).float() if options.dtype == "float32" else model
    target = Path(path)
    with onnx_file.staging(target) as draft, restored(subject), preserved(subject), torch.no_grad():
        subject.eval()
        ids, mask = greedy.left_padded(prompt_for(subject, prompt))
        entries = decoder_cache(subject, ids, mask)
        expected = greedy.in_torch(subject, on_device(subject, input_ids=ids, attention_mask=mask), new_tokens)
        written = to_onnx(CachedDecoder(subject, entries), (), draft, *_example(subject, entries), options=options)
        agreement = _proved(draft, (ids, mask), entries, expected, options)
        size = onnx_file.publish(draft, target)
    notes = (*written.notes, *_window_note(entries, ids.shape[1] + new_tokens))
    report = replace(written, path=target, bytes=size)
    return DecoderReport(report, entries, agreement, notes, time.perf_counter() - started)


def decoder_cache(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[CacheEntry, ...]:
    """The cache that a forward over `ids` [batch, length] fills.

    Raises:
        ExportError: There is none, or it isn't keys and values only.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ExportError(
            f"{type(model).__name__} has an encoder besides its decoder: export it with to_encoder_decoder_onnx."
        )
    output = probed(model, on_device(model, input_ids=ids, attention_mask=mask))
    return cache_entries(output.past_key_values, type(model).__name__)


def prompt_for(model: Any, prompt: Tensor | None) -> Tensor:
    """The prompt, or random token ids of the model.

    Raises:
        ExportError: It is no language model.
    """
    if prompt is not None:
        return prompt
    if not hasattr(model, "get_input_embeddings"):
        raise ExportError(f"{type(model).__name__} is no language model of transformers: export it with to_onnx.")
    return greedy.default_prompt(model)


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _example(model: nn.Module, entries: Sequence[CacheEntry]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, and which of their sizes are free."""
    device = next(model.parameters()).device
    mask = torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long)
    mask[0, :2] = 0
    tokens = {"input_ids": torch.arange(_BATCH * _NEW).view(_BATCH, _NEW) % 3, "attention_mask": mask}
    if _takes_positions(model):
        tokens["position_ids"] = (mask.cumsum(1) - 1)[:, -_NEW:]
    pairs = [entry.random(_BATCH, _PAST, device) for entry in entries]
    lengths = {"attention_mask": "past_sequence + sequence"}
    free: dict[str, Any] = {name: {0: "batch", 1: lengths.get(name, "sequence")} for name in tokens}
    free["past_key_values"] = [{name: {0: "batch", 2: "past_sequence"} for name in pair} for pair in pairs]
    return {**on_device(model, **tokens), "past_key_values": pairs}, free


def _proved(
    draft: Path,
    prompt: tuple[Tensor, Tensor],
    entries: Sequence[CacheEntry],
    expected: greedy.Decoded,
    options: OnnxOptions,
) -> greedy.Agreement:
    """Decode in ONNX Runtime and compare."""
    session = open_session(draft, torch.get_num_threads())
    feeds = first_feeds(session, prompt)
    try:
        got = greedy.in_onnx(session, feeds, expected.tokens.shape[1])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime fails while it decodes, where PyTorch doesn't ({error}); not written."
        ) from error
    return greedy.agreement(expected, got, tolerance_for(entries[0].dtype, options.rtol, options.atol))


def decoder_feeds(path: str | os.PathLike[str], prompts: Iterable[Tensor]) -> list[greedy.Step]:
    """Batches to quantise a decoder's file with: each prompt, ids [batch, length], in full, and the token that follows it.

    Raises:
        ExportError: The file can't be run, or has no cache as `to_decoder_onnx` makes it.
    """
    session = open_session(Path(path), torch.get_num_threads())
    if not any(value.name.startswith(_CACHE) for value in session.get_inputs()):
        raise ExportError(f"{path} has no inputs {_CACHE}...: it is no decoder's file that to_decoder_onnx made.")
    feeds = [first_feeds(session, (prompt, torch.ones_like(prompt))) for prompt in prompts]
    return [step for first in feeds for step in (first, greedy.following(session, first))]


def first_feeds(session: Any, prompt: tuple[Tensor, Tensor]) -> greedy.Step:
    """All inputs of a decoder's file for a prompt: ids and mask, each [batch, length], and an empty cache."""
    ids, mask = (tensor.cpu().long() for tensor in prompt)
    tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    feeds: greedy.Step = {}
    for value in session.get_inputs():
        if value.name.startswith(_CACHE):
            shape = (len(ids), value.shape[1], 0, value.shape[3])
            feeds[value.name] = np.zeros(shape, dtype_of(value.type))
        else:
            feeds[value.name] = tokens[value.name].numpy()
    return feeds


def _window_note(entries: Sequence[CacheEntry], length: int) -> list[str]:
    windows = [entry.window for entry in entries if entry.window is not None]
    if not windows or min(windows) <= length:
        return []
    return [f"layers look back {min(windows)} tokens only, and the check of {length} tokens doesn't reach that far"]
