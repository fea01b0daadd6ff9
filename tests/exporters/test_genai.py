"""Folders for onnxruntime-genai generate there as generate() does, where it is installed; elsewhere they say they weren't run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from depgraph.errors import CheckpointError, ExportError
from exporters import GenaiOptions, QuantOptions, to_genai
from exporters.caching import CacheEntry
from exporters.genai import TEXT, _same_length, genai_settings
from exporters.greedy import Decoded

from .models import VOCABULARY, llama, uneven_llama

COUNT = 20
PROMPT = torch.arange(3, 15).view(2, 6)


def tokenizer() -> Any:
    """One token a letter."""
    letters = ["<pad>", "<s>", "</s>", *dict.fromkeys(TEXT.replace(" ", "\u0120"))]
    words = [*letters, *(f"<{number}>" for number in range(VOCABULARY - len(letters)))]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def run(folder: Path, count: int = COUNT) -> list[list[int]]:
    genai: Any = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=PROMPT.shape[1] + count, batch_size=len(PROMPT))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(PROMPT.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row).tolist() for row in range(len(PROMPT))]


def endless(model: Any) -> Any:
    """The token that ends a text has logit zero, which is never the largest."""
    with torch.no_grad():
        model.lm_head.weight[model.generation_config.eos_token_id] = 0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, uneven_llama], ids=["grouped_query", "uneven"])
def test_it_generates_the_same_tokens(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model = endless(make())
    report = to_genai(model, tokenizer(), tmp_path / "files", PROMPT)
    expected = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=COUNT, do_sample=False)
    assert run(tmp_path / "files") == expected.tolist()
    assert report.agreement is not None and report.agreement.tokens == 2 * COUNT
    assert "In onnxruntime-genai 40 greedy tokens" in str(report)
    settings = json.loads((tmp_path / "files" / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["num_hidden_layers"] == len(report.decoder.cache)


@pytest.mark.slow
def test_a_quantised_one_generates_what_its_file_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    options = GenaiOptions(quantise=QuantOptions("int8-dynamic"))
    report = to_genai(endless(llama()), tokenizer(), tmp_path / "files", PROMPT, options=options)
    assert report.quantised is not None and report.quantised.bytes == (tmp_path / "files" / "model.onnx").stat().st_size
    assert report.agreement is not None and report.agreement.reference == "ONNX Runtime"
    assert len(run(tmp_path / "files")[0]) == PROMPT.shape[1] + COUNT


@pytest.mark.slow
def test_without_onnxruntime_genai_it_says_that_nothing_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    report = to_genai(llama(), tokenizer(), tmp_path / "files")
    assert report.agreement is None and "It wasn't run" in str(report) and "depgraph[genai]" in report.notes[0]
    names = {path.name for path in (tmp_path / "files").iterdir()}
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "tokenizer_config.json"} <= names


def test_what_the_settings_cannot_say_is_refused(tmp_path: Path) -> None:
    model, options = llama(), GenaiOptions()
    entries = [CacheEntry(0, 2, 6, 6, torch.float32), CacheEntry(1, 2, 4, 4, torch.float32)]
    with pytest.raises(ExportError, match="are 4 and 6 wide, but genai_config.json holds one"):
        genai_settings(model, tokenizer(), entries, tmp_path / "none", options)
    with pytest.raises(ExportError, match="needs a tokenizer"):
        to_genai(model, None, tmp_path / "files")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").touch()
    with pytest.raises(CheckpointError, match="isn't empty"):
        to_genai(model, tokenizer(), tmp_path)


def test_a_run_that_ends_early_is_compared_up_to_there() -> None:
    logits = tuple(np.eye(3, dtype=np.float32)[None, i] for i in range(3))
    longer, shorter = Decoded(np.array([[0, 1, 2]]), logits, "a"), Decoded(np.array([[0, 1]]), logits[:2], "b")
    assert _same_length(longer, shorter).tokens.tolist() == [[0, 1]]


def test_how_long_and_what_ends_a_text_must_be_known(tmp_path: Path) -> None:
    from exporters.genai import _context_length, _ends

    plain = SimpleNamespace(config=SimpleNamespace(), generation_config=None)
    limitless = SimpleNamespace(model_max_length=10**30, eos_token_id=None)
    with pytest.raises(ExportError, match="give GenaiOptions.context_length"):
        _context_length(plain, limitless, GenaiOptions())
    assert _context_length(plain, limitless, GenaiOptions(context_length=99)) == 99
    with pytest.raises(ExportError, match="which token ends a text"):
        _ends(plain, limitless)
    assert _ends(llama(), limitless) == [2]
