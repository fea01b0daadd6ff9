"""Files that generate, in a build: what stands for them, their size and quality."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from depgraph.errors import ScoreError
from exporters import building
from exporters.building import Budget, Subject, Ways, build
from exporters.building.generating import generated, kind_of, quality_of
from exporters.building.precisions import file_bytes
from importance.formulas import formula_of
from importance.losses import own_loss
from importance.sweeping import Figure

WORDS = 60


def pairs(**more: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, **sizes, **ids, **more)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def batch(model: Any) -> dict[str, torch.Tensor]:
    texts, labels = torch.randint(2, WORDS, (2, 9)), torch.randint(2, WORDS, (2, 7))
    begun = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return {
        "input_ids": texts,
        "attention_mask": torch.ones_like(texts),
        "decoder_input_ids": begun,
        "labels": labels,
    }


def mean_loss(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return math.fsum(float(own_loss(model(**each), each)) for each in batches) / len(batches)


def subject_of(model: nn.Module, tokenizer: Any = None) -> Subject:
    batches = [batch(model) for _ in range(2)]
    example = {name: tensor for name, tensor in batches[0].items() if name != "labels"}
    figure = Figure("loss", "pairs")
    return Subject(model, (), example, partial(mean_loss, batches=batches), figure, batches, tokenizer=tokenizer)


def words() -> Any:
    """A tokenizer of numbers as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({str(k): k for k in range(WORDS)}, unk_token="0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@pytest.mark.slow
def test_an_encoder_decoder_comes_with_what_generates(tmp_path: Path) -> None:
    model, most = pairs(), 85_000
    ways = Ways(recipes=("magnitude",), shares=(), probes=0, depth="none")
    built = build(subject_of(model, words()), Budget(bytes=most), tmp_path / "small", ways)
    folder = tmp_path / "small" / "seq2seq"
    both = [file_bytes(folder / name) for name in ("encoder.onnx", "decoder.onnx")]
    assert 0.7 * most < sum(both) <= most and built.best.plan is not None
    named = {file.name: file.bytes for file in built.story.files}
    assert [named["seq2seq/encoder.onnx"], named["seq2seq/decoder.onnx"]] == both
    assert [f.what for f in built.story.files[:2]] == [
        "the encoder, run once, float32",
        "the decoder, with its cache, float32",
    ]
    text = "7 23 41 8 52"
    ids = torch.tensor([[int(word) for word in text.split()]])
    expected = built.best.model.generate(ids, max_new_tokens=10, do_sample=False)[0, 1:]
    assert said(tmp_path / "small", text, "10") == tokens_of(expected)


def said(folder: Path, *words: str) -> list[str]:
    """The first line that run.py prints, in words."""
    done = subprocess.run([sys.executable, folder / "run.py", *words], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[0].split()


def tokens_of(found: torch.Tensor) -> list[str]:
    return [str(int(token)) for token in found]


def alone(subject: Subject, path: Path) -> dict[str, Any]:
    """The files that generate in a folder, with run.py and the example as a build leaves them; the settings of run.py."""
    path.mkdir()
    made = generated(subject.model, subject, path / "seq2seq", ("float32", 20))
    assert made is not None and not made.why
    shutil.copy(Path(building.__file__).parent / made.kind.script, path / "run.py")
    np.savez(path / "example.npz", **{name: tensor.numpy() for name, tensor in subject.kwargs.items()})
    return json.loads((path / "seq2seq" / "settings.json").read_text()) | {"notes": made.notes}


@pytest.mark.slow
def test_run_answers_as_the_settings_of_generate_say(tmp_path: Path) -> None:
    model: Any = pairs()
    subject = subject_of(model)
    del subject.kwargs["attention_mask"]
    texts = subject.kwargs["input_ids"]
    plain = model.generate(texts[:1], max_new_tokens=6, do_sample=False)[0, 1:]
    model.generation_config.forced_bos_token_id = int(texts[0, 0])
    model.generation_config.suppress_tokens = [int(plain[1])]
    expected = model.generate(texts[:1], max_new_tokens=10, do_sample=False)[0, 1:]
    assert not torch.equal(plain, expected[:6])
    model.generation_config.num_beams = 3
    settings = alone(subject, tmp_path / "small")
    assert any("likeliest token each time, where the model asks for num_beams=3" in note for note in settings["notes"])
    assert said(tmp_path / "small", str(tmp_path / "small" / "example.npz"), "10") == tokens_of(expected)
    file = tmp_path / "small" / "seq2seq" / "settings.json"
    end = int(expected[4])
    file.write_text(json.dumps({**settings, "ends": [end]}))
    stopped = tokens_of(expected)[: expected.tolist().index(end) + 1]
    assert said(tmp_path / "small") == stopped


@pytest.mark.slow
def test_what_hears_is_run_on_the_features_of_the_example(tmp_path: Path) -> None:
    from transformers import GenerationMixin

    from tests.zoo import ZOO

    example = ZOO["whisper"]()
    model: Any = copy.deepcopy(example.model)
    model.generation_config.eos_token_id = None  # so that all is said that there is to say
    model.config.eos_token_id = None
    subject = Subject(model, example.args, example.kwargs, lambda other: 0.0, Figure("none"))
    settings = alone(subject, tmp_path / "small")
    assert any("begins in a way of its own" in note for note in settings["notes"])
    given = {"input_features": example.kwargs["input_features"][:1], "decoder_start_token_id": settings["start"][0]}
    expected = GenerationMixin.generate(model, **given, do_sample=False, max_new_tokens=8)[0, 1:]
    assert len(expected) == 8
    assert said(tmp_path / "small", str(tmp_path / "small" / "example.npz"), "8") == tokens_of(expected)


@pytest.mark.slow
def test_quality_of_two_files_is_that_of_the_model(tmp_path: Path) -> None:
    model = pairs()
    subject = subject_of(model)
    made = generated(model, subject, tmp_path / "two", ("int8-dynamic", 20))
    assert made is not None and not made.why
    quality, why = quality_of(made.kind, made.folder, model, subject)
    assert not why and quality == pytest.approx(subject.measure(model), rel=0.05)
    broken = replace(subject, measure=lambda other: float(other.shared.weight.sum()))
    nothing, why = quality_of(made.kind, made.folder, model, broken)
    assert nothing is None and "seq2seq/encoder.onnx and seq2seq/decoder.onnx wasn't measured" in why


def test_what_does_not_generate_has_no_such_files() -> None:
    plain = nn.Linear(2, 2)
    subject = Subject(plain, (torch.ones(1, 2),), {}, lambda model: 0.0, Figure("none"))
    assert kind_of(plain, subject) is None
    model = pairs()
    kind = kind_of(model, subject_of(model))
    assert kind is not None and list(kind.files) == ["encoder.onnx", "decoder.onnx"]
    assert kind_of(model, replace(subject_of(model), kwargs={})) is None


def masked() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = torch.randint(2, 40, (2, 8))
    return BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).eval(), {
        "input_ids": ids,
        "labels": torch.where(ids > 20, ids, -100),
    }


def causal() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = torch.randint(2, 40, (2, 8))
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config).eval(), {"input_ids": ids, "labels": ids}


def two() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = pairs()
    return model, batch(model)


@pytest.mark.parametrize("make", [masked, causal, two])
def test_a_loss_is_found_from_logits_as_the_model_finds_it(make: Any) -> None:
    model, given = make()
    formula = formula_of(model, given)
    with torch.no_grad():
        nn.init.normal_(next(model.parameters()))  # another model's numbers
        output = model(**given)
    torch.testing.assert_close(formula(output.logits, given["labels"]), output.loss)


def test_a_loss_of_its_own_kind_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (x * labels).sum().square() + 17, "logits": x}

    with pytest.raises(ScoreError, match="loss of Odd isn't computed from its logits and labels by a formula"):
        formula_of(Odd(), {"x": torch.randn(3, 4), "labels": torch.randn(3, 4)})
