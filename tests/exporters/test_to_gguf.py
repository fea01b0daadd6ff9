"""GGUF files say what the models compute: read by gguf, by transformers and, where it is installed, by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import ExportError
from exporters import GgufOptions, gguf_llama_cpp, to_gguf
from exporters.gguf_reading import GgufModel
from tests.exporters import pruned
from tests.exporters.pruned import IDS
from tests.exporters.test_gguf_anatomy import Renamed
from tests.exporters.test_gguf_vocabulary import of_pieces

gguf = pytest.importorskip("gguf")
FULL = GgufOptions(weights="f32")
OTHER = torch.arange(20)[None] * 7 % 50


def facts(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(ids).logits
    return made


def test_transformers_loads_a_uniform_model_with_the_same_logits(tmp_path: Path) -> None:
    model = pruned.without(pruned.llama(), "model.layers.0.self_attn", "model.layers.0.mlp")
    report = to_gguf(model, IDS, tmp_path, options=FULL)
    assert "'llama'" in report.format and report.max_rel_error < 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(again, OTHER), logits(model, OTHER), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gone", [(), ("model.layers.0.self_attn",), ("model.layers.0.mlp",), ("model.layers.1.mlp",)])
def test_a_model_whose_layers_differ_is_written_with_sizes_per_layer(gone: tuple[str, ...], tmp_path: Path) -> None:
    model = pruned.llama(0.7, scope="global")
    model = pruned.without(model, *gone) if gone else model
    report = to_gguf(model, IDS, tmp_path / "small.gguf", options=FULL)
    assert "'deci'" in report.format
    torch.testing.assert_close(GgufModel(report.path)(OTHER), logits(model, OTHER), rtol=1e-4, atol=1e-5)


def test_the_file_says_what_was_pruned_and_for_how_many_tokens(tmp_path: Path) -> None:
    model = pruned.llama(0.8)
    said = facts(to_gguf(model, IDS, tmp_path, options=GgufOptions(name="Small")).path)
    assert said["general.name"] == "Small" and "removed" in said["depgraph.pruned"]
    assert said[f"{said['general.architecture']}.context_length"] == 128


@pytest.mark.parametrize("value_width", [3, 4, 6])
def test_a_model_of_other_names_scales_and_frequencies_is_written_too(value_width: int, tmp_path: Path) -> None:
    model = Renamed(value_width).eval()
    with pytest.raises(ExportError, match=r"for how many tokens .*GgufOptions\(context="):
        to_gguf(model, IDS, tmp_path)
    report = to_gguf(model, IDS, tmp_path, options=GgufOptions(weights="f32", context=64))
    with torch.no_grad():
        torch.testing.assert_close(GgufModel(report.path)(OTHER), model(OTHER), rtol=1e-4, atol=1e-5)


def test_blocks_want_rows_that_the_rounding_gives(tmp_path: Path) -> None:
    options = GgufOptions(weights="q4_0")
    with pytest.raises(ExportError, match=r"rows of \d+, but q4_0 stores blocks of 32: plan with round_to='gguf'"):
        to_gguf(pruned.llama(0.7), IDS, tmp_path, options=options)
    assert not list(tmp_path.iterdir())
    report = to_gguf(pruned.llama(0.7, round_to="gguf"), IDS, tmp_path, options=options)
    full = to_gguf(pruned.llama(0.7, round_to="gguf"), IDS, tmp_path / "full.gguf", options=FULL)
    assert report.bytes < full.bytes / 3 and full.max_rel_error < 1e-5 < report.max_rel_error


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("q4_k", r"llama-quantize, which needs rows of a multiple of 256 .*round_to='gguf-k'"),
        ("int8", "is not one of f32"),
    ],
)
def test_formats_that_cannot_be_written_are_refused(weights: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        to_gguf(pruned.llama(), IDS, tmp_path, options=GgufOptions(weights=weights))


def test_a_model_in_bfloat16_stays_as_it_is(tmp_path: Path) -> None:
    model = pruned.llama().bfloat16().train()
    to_gguf(model, IDS, tmp_path, options=GgufOptions(weights="bf16"))
    assert model.dtype == torch.bfloat16 and model.training


def test_biases_and_scaled_frequencies_are_kept(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.Qwen2Config(
        **pruned.LLAMA, rope_parameters={**scaled, "original_max_position_embeddings": 32}, tie_word_embeddings=True
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    report = to_gguf(model, IDS, tmp_path, options=FULL)
    torch.testing.assert_close(GgufModel(report.path)(OTHER), logits(model, OTHER), rtol=1e-3, atol=1e-4)


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    tokenizer = of_pieces()
    model = pruned.llama()
    to_gguf(model, IDS, tmp_path, tokenizer=tokenizer, options=FULL)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again("ab ba abab").input_ids[-5:] == tokenizer("ab ba abab").input_ids[-5:]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["f32", "f16", "q8_0", "q4_0"])
def test_llama_cpp_gives_the_same_logits(weights: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = pruned.without(pruned.llama(0.7, scope="global", round_to="gguf"), "model.layers.1.self_attn")
    report = to_gguf(model, IDS, tmp_path, options=GgufOptions(weights=weights))
    assert "llama.cpp" in report.runtime
    made = gguf_llama_cpp.logits(report.path, OTHER[0].numpy())
    limit = 1e-4 if weights == "f32" else 0.1
    expected = GgufModel(report.path)(OTHER)[0].numpy()
    np.testing.assert_allclose(made, expected, rtol=0, atol=limit * np.abs(expected).max())


def test_what_is_not_llama_like_leaves_nothing(tmp_path: Path) -> None:
    small = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    with pytest.raises(ExportError, match="Llama-like"):
        to_gguf(model, IDS, tmp_path)
    with pytest.raises(ExportError, match=r"doesn't end in \.gguf"):
        to_gguf(model, IDS, tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_keeps_rows_of_blocks_where_none_of_the_sizes_was_one(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**pruned.LLAMA, "hidden_size": 128, "intermediate_size": 300})
    model = transformers.LlamaForCausalLM(config).eval()
    graph = depgraph.trace(model, IDS)
    small = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8), round_to="gguf").apply()
    assert all(p.shape[1] % 32 == 0 for p in small.parameters() if p.dim() == 2)
    to_gguf(small, IDS, tmp_path, options=GgufOptions(weights="q8_0"))
