"""Encoder-decoders as two files: whoever decodes with them gets the tokens that generate() gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin

import depgraph
from depgraph.errors import CheckpointError, ExportError
from exporters import OnnxOptions, to_encoder_decoder_onnx
from tests.zoo import ZOO

from .models import llama, t5

COUNT = 20


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model and what its encoder takes."""
    if name == "t5":  # the zoo's says one word only
        return t5()
    example = ZOO[name]()
    return copy.deepcopy(example.model), {n: t for n, t in example.kwargs.items() if not n.startswith("decoder_")}


def generated(model: Any, inputs: dict[str, Tensor], start: int) -> np.ndarray:
    model.generation_config = GenerationConfig(decoder_start_token_id=start, pad_token_id=0, bos_token_id=start)
    settings = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None}
    return GenerationMixin.generate(model, **inputs, **settings)[:, -COUNT:].numpy()


def decoded(folder: Path, inputs: dict[str, Tensor], start: int) -> np.ndarray:
    """As a user would do it who knows nothing but the names."""
    encoder, decoder = (onnxruntime.InferenceSession(str(folder / f"{name}.onnx")) for name in ("encoder", "decoder"))
    made = encoder.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    cross = dict(zip([o.name.replace("present", "past_key_values") for o in encoder.get_outputs()], made, strict=True))
    assert cross.pop("last_hidden_state").ndim == 3
    batch = len(next(iter(inputs.values())))
    own = {v.name: v.shape for v in decoder.get_inputs() if ".decoder." in v.name}
    past = {name: np.zeros((batch, shape[1], 0, shape[3]), np.float32) for name, shape in own.items()}
    mask = {"encoder_attention_mask": inputs["attention_mask"].numpy()} if "attention_mask" in inputs else {}
    tokens = [np.full((batch, 1), start)]
    for _ in range(COUNT):
        outputs = decoder.run(None, {"input_ids": tokens[-1], **mask, **cross, **past})
        named = dict(zip([o.name for o in decoder.get_outputs()], outputs, strict=True))
        past = {name: named[name.replace("past_key_values", "present")] for name in past}
        tokens.append(named["logits"][:, -1].argmax(-1)[:, None])
    return np.concatenate(tokens[1:], 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opset"), [("t5", 20), ("bart", 20), ("whisper", 20), ("t5", 23)])
def test_both_files_generate_the_same_tokens(name: str, opset: int, tmp_path: Path) -> None:
    model, inputs = built(name)
    report = to_encoder_decoder_onnx(model, inputs, tmp_path / "files", options=OnnxOptions(opset=opset))
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == ["decoder.onnx", "encoder.onnx"]
    assert report.agreement.tokens >= 2 * COUNT and report.agreement.ties == 0 and report.encoder.opset == opset
    tokens = decoded(tmp_path / "files", inputs, report.start)
    assert len(np.unique(tokens)) > 2
    assert np.array_equal(tokens, generated(model, inputs, report.start))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_example_without_mask_leaves_room_for_texts_of_several_lengths(name: str, tmp_path: Path) -> None:
    model, inputs = built(name)
    ids = inputs["input_ids"].clamp(min=3)
    report = to_encoder_decoder_onnx(model, {"input_ids": ids}, tmp_path / "files")
    cut = torch.tensor([0, 2, 5])[: len(ids), None]
    for kept in (torch.arange(ids.shape[1]) >= cut, torch.arange(ids.shape[1]) < ids.shape[1] - cut):
        padded = {"input_ids": ids * kept, "attention_mask": kept.long()}
        tokens = decoded(tmp_path / "files", padded, report.start)
        assert np.array_equal(tokens, generated(model, padded, report.start))
        without = decoded(tmp_path / "files", padded | {"attention_mask": torch.ones_like(ids)}, report.start)
        assert not np.array_equal(tokens, without)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["self_attn", "encoder_attn"])
def test_a_layer_without_one_attention_keeps_its_number(part: str, tmp_path: Path) -> None:
    example = ZOO["bart"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    branch = next(b.name for b in graph.branches if "decoder" in b.name and b.name.endswith(part))
    model = graph.cut_plan(branches=[branch]).apply()
    inputs = built("bart")[1]
    report = to_encoder_decoder_onnx(model, inputs, tmp_path / "files")
    names = {v.name for v in onnxruntime.InferenceSession(str(tmp_path / "files" / "decoder.onnx")).get_inputs()}
    assert sum(name.startswith("past_key_values.") for name in names) == 6
    assert np.array_equal(decoded(tmp_path / "files", inputs, report.start), generated(model, inputs, report.start))


def test_what_is_no_encoder_decoder_is_refused(tmp_path: Path) -> None:
    model, inputs = built("bart")
    with pytest.raises(ExportError, match="is no encoder-decoder"):
        to_encoder_decoder_onnx(llama(), {"input_ids": inputs["input_ids"]}, tmp_path / "files")
    with pytest.raises(ExportError, match="`inputs` is empty"):
        to_encoder_decoder_onnx(model, {}, tmp_path / "files")
    with pytest.raises(ExportError, match="BartForConditionalGeneration fails on the prompt"):
        to_encoder_decoder_onnx(model, {**inputs, "nothing": inputs["input_ids"]}, tmp_path / "files")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ExportError, match="says no token to start with"):
        to_encoder_decoder_onnx(model, inputs, tmp_path / "files")
    assert not list(tmp_path.iterdir())
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine").touch()
    with pytest.raises(CheckpointError, match="isn't empty"):
        to_encoder_decoder_onnx(model, inputs, tmp_path / "files")


@pytest.mark.slow
def test_a_decoder_that_is_deeper_than_its_encoder_is_written_with_the_cache_that_it_wants(tmp_path: Path) -> None:
    model, inputs = t5()
    example = {**inputs, "decoder_input_ids": inputs["input_ids"].clone()}
    graph = depgraph.trace(model, (), example)
    shallow = graph.cut_plan(branches=["encoder.block.1"]).apply()
    report = to_encoder_decoder_onnx(shallow, inputs, tmp_path / "files")
    assert any("past_key_values=EncoderDecoderCache" in note for note in report.notes)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    expected = generated(shallow, {**inputs, "past_key_values": cache}, report.start)
    assert np.array_equal(decoded(tmp_path / "files", inputs, report.start), expected)
