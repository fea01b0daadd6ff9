"""A folder that onnxruntime-genai runs: the decoder's file, its settings and the tokenizer."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph.errors import ExportError, first_line
from depgraph.storage import appearing, free_folder
from exporters import greedy
from exporters.caching import CacheEntry
from exporters.decoder import DecoderReport, decoder_feeds, first_feeds, prompt_for, to_decoder_onnx
from exporters.onnx_check import Tolerance, open_session, tolerance_for
from exporters.onnx_export import OnnxOptions
from exporters.quantising import QuantOptions, QuantReport, quantise_in_place

MODEL, SETTINGS = "model.onnx", "genai_config.json"
TEXT = 'Once upon a time, there was 1 cat: it said (quietly) "Don\'t!"'

_DEFAULTS = OnnxOptions()
_LONGEST = 1_000_000  # tokenizers without a limit say a number far above


@dataclass(frozen=True)
class GenaiOptions:
    """How to make the folder.

    Attributes:
        onnx: How to export the decoder.
        quantise: How to quantise it; None: not at all.
        data: Token ids [batch, length] to calibrate and compare on; None: the prompt.
        context_length: How many tokens the folder promises to hold; None: what tokenizer or configuration say.
        new_tokens: How many tokens the checks compare.
    """

    onnx: OnnxOptions = _DEFAULTS
    quantise: QuantOptions | None = None
    data: Sequence[Tensor] | None = None
    context_length: int | None = None
    new_tokens: int = greedy.NEW_TOKENS


@dataclass(frozen=True)
class GenaiReport:
    """A folder, and how it was seen to generate.

    Attributes:
        decoder: The report of the float file against `generate()`.
        quantised: The report of the quantised file against that; None where none was asked for.
        agreement: Greedy tokens of onnxruntime-genai against `generate()` (against ONNX Runtime for a quantised file); None
            where onnxruntime-genai isn't installed.
        notes: What one should know.
        seconds: The whole export took.
    """

    path: Path
    decoder: DecoderReport
    quantised: QuantReport | None
    agreement: greedy.Agreement | None
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        size = (self.quantised or self.decoder.onnx).bytes
        notes = "".join(f" Note: {note}." for note in self.notes)
        seen = f"In onnxruntime-genai {self.agreement}." if self.agreement else "It wasn't run in onnxruntime-genai."
        return f"Wrote {self.path} ({size:,} bytes of model) in {self.seconds:.1f} s. {seen}{notes}"


_OPTIONS = GenaiOptions()


def to_genai(
    model: nn.Module,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    prompt: Tensor | None = None,
    *,
    options: GenaiOptions = _OPTIONS,
) -> GenaiReport:
    """Make a folder for onnxruntime-genai, and prove where that is installed that it generates as `generate()` does.

    onnxruntime-genai takes batches of equal length only: it doesn't mask padding in prompts. Its tokenizer puts special
    tokens (a start token, say) before a text after `tokenizer.update_options(add_special_tokens="true")`.

    Args:
        tokenizer: Of transformers, with a `tokenizer.json`.
        prompt: Token ids [batch, length] to compare with; None: random ones.
        folder: Where to; it must not exist or be empty.

    Raises:
        ExportError: As `to_decoder_onnx` and `quantise`; or keys and values have several widths, which genai_config.json
            can't say; or tokens, of the model or of a text, differ in onnxruntime-genai. No folder is left.
        CheckpointError: The folder can't be written or isn't empty.
    """
    started = time.perf_counter()
    path = free_folder(folder, "never")
    if not hasattr(tokenizer, "save_pretrained"):
        raise ExportError(f"to_genai needs a tokenizer of transformers, not {type(tokenizer).__name__}.")
    with appearing(path) as draft:
        ids = prompt_for(model, prompt)
        decoder = to_decoder_onnx(model, draft / MODEL, ids, options=options.onnx, new_tokens=options.new_tokens)
        settings = genai_settings(model, tokenizer, decoder.cache, draft / MODEL, options)
        quantised = _quantised(draft, ids, options)
        (draft / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        tokenizer.save_pretrained(draft)
        agreement, notes = _proved(draft, model, tokenizer, ids, (decoder, options))
    return GenaiReport(
        path,
        replace(decoder, onnx=replace(decoder.onnx, path=path / MODEL)),
        quantised and replace(quantised, path=path / MODEL),
        agreement,
        tuple(dict.fromkeys((*decoder.notes, *(quantised.notes if quantised else ()), *notes))),
        time.perf_counter() - started,
    )


def genai_settings(
    model: Any, tokenizer: Any, cache: Sequence[CacheEntry], file: Path, options: GenaiOptions
) -> dict[str, Any]:
    """The contents of genai_config.json.

    Raises:
        ExportError: The heads have several widths, or nothing says how long a text may be.
    """
    widths = sorted({width for entry in cache for width in (entry.key_width, entry.value_width)})
    if len(widths) > 1:
        raise ExportError(
            f"The heads of {type(model).__name__} are {' and '.join(map(str, widths))} wide, but genai_config.json holds one "
            "head_size: prune the same number of elements from every head, or export with to_decoder_onnx."
        )
    session = open_session(file)
    inputs = [value.name for value in session.get_inputs() if not value.name.startswith("past_key_values.")]
    vocabulary = next(value.shape[2] for value in session.get_outputs() if value.name == "logits")
    ends = _ends(model, tokenizer)
    length = _context_length(model, tokenizer, options)
    heads = max(entry.heads for entry in cache)
    decoder = {
        "filename": MODEL,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": widths[0],
        "hidden_size": int(model.get_input_embeddings().weight.shape[1]),
        "num_attention_heads": int(getattr(model.config, "num_attention_heads", None) or heads),
        "num_key_value_heads": heads,
        "num_hidden_layers": len(cache),
        "inputs": {
            **{name: name for name in inputs},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    ids = {
        "bos_token_id": next((i for i in (tokenizer.bos_token_id, ends[0]) if i is not None), 0),
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    search = {"do_sample": False, "max_length": length, "num_beams": 1, "past_present_share_buffer": False}
    about = {"type": "decoder", "context_length": length, "vocab_size": int(vocabulary)}
    return {"model": {**about, **ids, "decoder": decoder}, "search": search}


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text."""
    places = (getattr(model, "generation_config", None), model.config, tokenizer)
    found = next((e for e in (getattr(place, "eos_token_id", None) for place in places) if e is not None), None)
    if found is None:
        raise ExportError("Nothing says which token ends a text: set model.generation_config.eos_token_id.")
    return [found] if isinstance(found, int) else list(found)


def _context_length(model: Any, tokenizer: Any, options: GenaiOptions) -> int:
    said = (options.context_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    length = next((int(value) for value in said if value and value < _LONGEST), None)
    if length is None:
        raise ExportError("Nothing says how many tokens the model holds: give GenaiOptions.context_length.")
    return length


def _quantised(draft: Path, ids: Tensor, options: GenaiOptions) -> QuantReport | None:
    """Quantise the file in its place."""
    if options.quantise is None:
        return None
    data = decoder_feeds(draft / MODEL, [ids] if options.data is None else options.data)
    return quantise_in_place(draft / MODEL, data, options=options.quantise)


def _proved(
    draft: Path, model: nn.Module, tokenizer: Any, ids: Tensor, made: tuple[DecoderReport, GenaiOptions]
) -> tuple[greedy.Agreement | None, list[str]]:
    """Generate and tokenize in onnxruntime-genai and compare."""
    decoder, options = made
    try:
        genai: Any = importlib.import_module("onnxruntime_genai")
    except ImportError:
        return None, [
            "install onnxruntime-genai to have the folder run before it appears: pip install 'depgraph[genai]'"
        ]
    expected, tolerance = _reference(draft, model, ids, decoder, options)
    try:
        loaded = genai.Model(str(draft))
        got = _decoded(genai, loaded, ids.cpu().numpy().astype(np.int32), options.new_tokens)
        splitter = genai.Tokenizer(loaded)
        splitter.update_options(add_special_tokens="true")
        pieces = [int(token) for token in splitter.encode(TEXT)]
    except Exception as error:
        raise ExportError(f"onnxruntime-genai can't run the folder ({first_line(error)}); not written.") from error
    wanted = tokenizer(TEXT)["input_ids"]
    if pieces != wanted:
        raise ExportError(
            f"onnxruntime-genai splits {TEXT!r} into tokens {pieces}, the given tokenizer into {wanted}; not written: use "
            "to_decoder_onnx with a tokenizer of your own."
        )
    return greedy.agreement(_same_length(expected, got), got, tolerance), []


def _reference(
    draft: Path, model: nn.Module, ids: Tensor, decoder: DecoderReport, options: GenaiOptions
) -> tuple[greedy.Decoded, Tolerance]:
    """What the folder should generate, and how near."""
    mask = torch.ones_like(ids)
    tolerance = tolerance_for(decoder.cache[0].dtype, options.onnx.rtol, options.onnx.atol)
    if options.quantise is None and options.onnx.dtype == "as is":
        device = next(model.parameters()).device
        given = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        return greedy.in_torch(model, given, options.new_tokens), tolerance
    session = open_session(draft / MODEL, torch.get_num_threads())
    return greedy.in_onnx(session, first_feeds(session, (ids, mask)), options.new_tokens), tolerance


def _decoded(genai: Any, model: Any, ids: np.ndarray, count: int) -> greedy.Decoded:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=ids.shape[1] + count, batch_size=len(ids), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    tokens: list[list[int]] = []
    logits = []
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        logits.append(np.asarray(generator.get_output("logits"), np.float32)[:, -1])
        tokens.append([generator.get_sequence(row)[-1] for row in range(len(ids))])
    return greedy.Decoded(np.array(tokens).T, tuple(logits), "onnxruntime-genai")


def _same_length(expected: greedy.Decoded, got: greedy.Decoded) -> greedy.Decoded:
    """As many tokens as there are before onnxruntime-genai stops at a text's end."""
    count = got.tokens.shape[1]
    return replace(expected, tokens=expected.tokens[:, :count], logits=expected.logits[:count])
