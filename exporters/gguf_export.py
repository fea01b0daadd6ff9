"""A Llama-like model becomes a GGUF file, which is read anew and run before it appears."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph.dependency import trace
from depgraph.errors import ExportError, first_line
from exporters import gguf_llama_cpp
from exporters.extras import required
from exporters.gguf_anatomy import decoder
from exporters.gguf_gaps import Gaps
from exporters.gguf_reading import GgufModel
from exporters.gguf_tensors import Contents, Weight, as_array, contents
from exporters.gguf_vocabulary import Vocabulary, vocabulary
from exporters.onnx_check import Difference, Tolerance, compare
from exporters.onnx_file import RECORD_KEY, VERSION_KEY, library_version, staging, writing
from exporters.verifying import FileReport, check_exportable, named_file, on_cpu, published, still

PLAIN = ("f32", "f16", "bf16")
BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Names of formats for matrices: of single numbers, and of blocks of 32 numbers with a scale."""

_ROUNDING = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2}  # of the largest logit, that rounded weights may change one by
_AS_STORED = 0.25  # of a tensor's norm, that the coarsest format may change it by
_CHECK = Tolerance(1e-4, 1e-5)


@dataclass(frozen=True)
class GgufOptions:
    """How to export.

    Attributes:
        weights: The format of matrices: "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0". Vectors stay float32.
        context: How many tokens the model was made for; None: what its config says.
        split: llama.cpp's name for how the tokenizer cuts text into words, where that isn't found.
        name: What the file calls the model; empty: the name of its class.
        rtol: Allowed error as a share of the largest logit, where weights are not in blocks; None: 1e-4, f16 1e-2, bf16 5e-2.
    """

    weights: str = "f16"
    context: int | None = None
    split: str = ""
    name: str = ""
    rtol: float | None = None


_DEFAULTS = GgufOptions()


def to_gguf(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    options: GgufOptions = _DEFAULTS,
) -> FileReport:
    """Export a Llama-like language model to GGUF, as llama.cpp reads it, and prove it.

    What each weight is, is found in the captured graph by what its parts compute, not by names. A model whose layers are all
    alike is written as llama.cpp's "llama", one whose layers differ or lack parts as its "deci", with widths per layer.

    The file is read anew and run in float32; where llama-cpp-python is installed, llama.cpp runs it too. Against PyTorch
    stands the same model with its weights in float32; the report's error is that of the file, its rounding included.

    Args:
        args: Example token ids [batch, length] of at least 3 tokens; a tuple, or one tensor. No mask.
        path: The file, which ends in .gguf, or a folder, for "model.gguf" in it.
        tokenizer: A fast tokenizer of transformers, or the folder of one; None: the file has none.

    Raises:
        ExportError: The `gguf` package isn't installed, the model isn't Llama-like, a row of a weight isn't a multiple of the
            format's blocks (`round_to="gguf"` plans such sizes), or the file computes something else. No file is left.
    """
    gguf = required("gguf", "gguf")
    check_exportable(model, "to_gguf")
    _check_format(options.weights)
    target = named_file(path, ".gguf", "model.gguf")
    model, (args, kwargs) = on_cpu(model, (args, kwargs))
    model = _in_float32(model)
    with staging(target) as draft, still(model):
        graph = trace(model, args, kwargs)
        found = contents(decoder(Gaps(graph)))
        _check_rows(gguf, found, options.weights)
        words = None if tokenizer is None else vocabulary(tokenizer, found.shape.vocabulary, options.split)
        _write(gguf, _File(found, words, _context(model, options), model, options), draft)
        cases = _cases(graph)
        difference, runtime, notes = _checked(found, draft, cases, options)
        size = published({draft: target})
    return FileReport(
        (target,),
        f"GGUF of architecture {found.shape.architecture!r}, matrices in {options.weights}",
        runtime,
        size,
        difference.absolute,
        difference.relative,
        tuple(f"ids {tuple(ids.shape)}" for ids, _ in cases),
        (*found.notes, *notes),
    )


def _check_format(weights: str) -> None:
    if weights in (*PLAIN, *BLOCKS):
        return
    if weights.endswith(("_k", "_k_m", "_k_s", "_k_l")):
        raise ExportError(
            f"weights={weights!r} can't be written from here: write 'f16' and turn that into {weights} with llama.cpp's "
            "llama-quantize, which needs rows of a multiple of 256 (plan with round_to='gguf-k')."
        )
    raise ExportError(f"weights={weights!r} is not one of {', '.join((*PLAIN, *BLOCKS))}.")


def _in_float32(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    plain = all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())
    return model if plain else copy.deepcopy(model).float()


def _check_rows(gguf: Any, found: Contents, weights: str) -> None:
    """Raise ExportError for the first matrix whose rows don't divide into the format's blocks."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[weights.upper()]][0]
    for name, weight in found.weights.items():
        if weight.values.dim() == 2 and weight.values.shape[1] % block:
            raise ExportError(
                f"{name} ({weight.source!r}) has rows of {weight.values.shape[1]}, but {weights} stores blocks of {block}: plan "
                "with round_to='gguf', or write weights='f16'."
            )


def _context(model: nn.Module, options: GgufOptions) -> int:
    """For how many tokens the model was made; within a sliding window, where it has one, all is as without."""
    config = getattr(model, "config", None)
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    found = options.context or min((n for n in known if isinstance(n, int)), default=0)
    if found < 1:
        raise ExportError("The model doesn't say for how many tokens it was made: give GgufOptions(context=...).")
    return found


@dataclass(frozen=True)
class _File:
    contents: Contents
    words: Vocabulary | None
    context: int
    model: nn.Module
    options: GgufOptions


def _write(gguf: Any, file: _File, draft: Path) -> None:
    writer = gguf.GGUFWriter(None, file.contents.shape.architecture)
    _write_facts(gguf, writer, file)
    _write_words(writer, file.words)
    for name, weight in file.contents.weights.items():
        kind = gguf.GGMLQuantizationType[_format_of(weight, file.options.weights).upper()]
        stored = gguf.quants.quantize(as_array(weight), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    with writing(draft.parent.parent / draft.name):
        writer.write_header_to_file(draft)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _format_of(weight: Weight, weights: str) -> str:
    return weights if weight.values.dim() == 2 else "f32"


def _write_facts(gguf: Any, writer: Any, file: _File) -> None:
    shape, options = file.contents.shape, file.options
    writer.add_name(options.name or type(file.model).__name__)
    writer.add_file_type(
        gguf.LlamaFileType["ALL_F32" if options.weights == "f32" else f"MOSTLY_{options.weights.upper()}"]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(VERSION_KEY, library_version())
    record = getattr(file.model, "depgraph_record", None)
    if record is not None:
        writer.add_string(RECORD_KEY, json.dumps(record))
    writer.add_context_length(file.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(len(shape.heads))
    writer.add_head_count(_per_layer(shape.heads))
    writer.add_head_count_kv(_per_layer(shape.kv_heads))
    writer.add_feed_forward_length(_per_layer(shape.neurons))
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.base)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)


def _per_layer(sizes: tuple[int, ...]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


def _write_words(writer: Any, words: Vocabulary | None) -> None:
    if words is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.split)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.kinds))
    if words.scores:
        writer.add_token_scores(list(words.scores))
    if words.merges:
        writer.add_token_merges(list(words.merges))
    for name, number in words.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{_ID_NAMES.get(name, name)}_token_id", number)
    for name, said in words.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", said)
    if words.template:
        writer.add_chat_template(words.template)


_ID_NAMES = {"unk": "unknown", "pad": "padding"}


def _cases(graph: Any) -> list[tuple[Tensor, Tensor]]:
    """Token ids with the logits that PyTorch makes of them: the example, and longer drawn ones where the model takes those."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((graph.args, graph.kwargs)) if isinstance(leaf, Tensor)]
    example = next(leaf for leaf in leaves if leaf.dim() == 2 and not leaf.is_floating_point())
    generator = torch.Generator().manual_seed(20)
    drawn = torch.randint(0, int(example.max()) + 1, (1, example.shape[1] + 5), generator=generator)
    cases = [(example, _logits(graph.model(*graph.args, **graph.kwargs)))]
    try:
        return [*cases, (drawn, _logits(graph.model(drawn.to(example))))]
    except Exception:
        return cases


def _logits(output: Any) -> Tensor:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return (output.logits if hasattr(output, "logits") else leaves[0]).detach()


def _checked(
    found: Contents, draft: Path, cases: list[tuple[Tensor, Tensor]], options: GgufOptions
) -> tuple[Difference, str, list[str]]:
    """The file's difference from PyTorch, by the independent reading, and in llama.cpp where that is installed."""
    reading = GgufModel(draft)
    exact = reading.of({name: torch.from_numpy(as_array(weight)) for name, weight in found.weights.items()})
    _difference(exact, cases, _CHECK)
    for name, values in exact.tensors.items():
        stored = reading.tensors[name]
        if stored.shape != values.shape or (stored - values).norm() > _AS_STORED * values.norm():
            raise ExportError(f"{name} isn't in the file as it was written; not written: report this, with the model.")
    limit = options.rtol or _ROUNDING.get(options.weights, 1e9)
    difference, runtime = (
        _difference(reading, cases, Tolerance(limit)),
        f"An independent reading (gguf {_version('gguf')})",
    )
    if not gguf_llama_cpp.version():
        return difference, runtime, ["llama.cpp itself didn't run the file, as llama-cpp-python isn't installed"]
    apart = _in_llama_cpp(draft, reading, cases, Tolerance(_ROUNDING.get(options.weights, 0.2), 1e-4))
    note = f"llama.cpp agrees with the independent reading to {apart.relative:.2g} of the largest logit"
    return difference, f"{runtime}, as llama.cpp (llama-cpp-python {gguf_llama_cpp.version()}),", [note]


def _difference(reading: GgufModel, cases: list[tuple[Tensor, Tensor]], limit: Tolerance) -> Difference:
    worst = Difference()
    for ids, expected in cases:
        worst |= compare(
            f"'logits' of {tuple(ids.shape)} ids", expected, reading(ids).numpy(), limit, "the file's reading"
        )
    return worst


def _in_llama_cpp(draft: Path, reading: GgufModel, cases: list[tuple[Tensor, Tensor]], limit: Tolerance) -> Difference:
    """llama.cpp's difference from the reading; it rounds activations to the format of the weights that they meet."""
    worst = Difference()
    for ids in (batch[0] for batch, _ in cases):
        try:
            made: np.ndarray = gguf_llama_cpp.logits(draft, ids.numpy())
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise ExportError(f"llama.cpp doesn't run the file ({first_line(error)}); not written.") from error
        worst |= compare(f"'logits' of {len(ids)} ids", reading(ids[None])[0], made, limit, "llama.cpp")
    return worst
