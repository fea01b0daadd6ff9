"""Decoders with their cache in one file: whoever decodes with it gets the tokens that generate() gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

import depgraph
from depgraph.errors import ExportError
from exporters import OnnxOptions, decoder_feeds, to_decoder_onnx
from exporters.caching import cache_entries
from exporters.greedy import Decoded, agreement, left_padded
from exporters.onnx_check import Differs, Tolerance
from tests.zoo import ZOO

from .models import gpt2, left_padded_prompt, llama, seeded, uneven_llama

COUNT = 20


def generated(model: Any, ids: Tensor, mask: Tensor) -> np.ndarray:
    settings = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return made[:, ids.shape[1] :].numpy()


def decoded(path: Path, ids: Tensor, mask: Tensor) -> np.ndarray:
    """As a user would do it who knows nothing but the names."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = {n: np.zeros((len(ids), s[1], 0, s[3]), np.float32) for n, s in shapes.items() if n.startswith("past_key")}
    new, seen, tokens = ids.numpy(), mask.numpy(), []
    for _ in range(COUNT):
        feeds = {"input_ids": new, "attention_mask": seen, **past}
        if "position_ids" in shapes:
            feeds["position_ids"] = np.maximum(seen.cumsum(1) - 1, 0)[:, -new.shape[1] :]
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        new = outputs["logits"][:, -1].argmax(-1)[:, None]
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        seen = np.concatenate([seen, np.ones_like(new)], 1)
        tokens.append(new)
    return np.concatenate(tokens, 1)


def without_attention() -> Any:
    model = llama(2)
    graph = depgraph.trace(model, (), {"input_ids": torch.arange(12).view(2, 6)})
    first = next(branch.name for branch in graph.branches if branch.kind == "attention")
    return graph.cut_plan(branches=[first]).apply()


def zoo(name: str) -> Callable[[], Any]:
    return lambda: copy.deepcopy(ZOO[name]().model)


def qwen3() -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 8, "vocab_size": 60, "num_hidden_layers": 1, "max_position_embeddings": 64, "pad_token_id": 0}
    return seeded("Qwen3ForCausalLM", "Qwen3Config", **sizes, **more)


@pytest.mark.ci
def test_a_grouped_query_decoder_generates_the_same_tokens(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "decoder.onnx"
    ids, mask = left_padded_prompt()
    before = copy.deepcopy(model.state_dict())
    report = to_decoder_onnx(model.train(), path)
    assert model.training and model.generation_config.max_new_tokens is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    expected = generated(model.eval(), ids, mask)
    assert len(np.unique(expected)) > 5  # it says something
    assert np.array_equal(decoded(path, ids, mask), expected)
    assert (report.agreement.tokens, report.agreement.ties, len(report.cache)) == (60, 0, 1)
    assert "60 greedy tokens of 3 sequences" in str(report) and [p.name for p in tmp_path.iterdir()] == ["decoder.onnx"]
    session = onnxruntime.InferenceSession(str(path))
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    past = ["batch", 2, "past_sequence", 6]
    assert shapes["past_key_values.0.key"] == shapes["past_key_values.0.value"] == past
    assert shapes["attention_mask"] == ["batch", "past_sequence + sequence"]
    assert shapes["logits"] == ["batch", "sequence", 60] and "present.0.value" in shapes
    feeds = decoder_feeds(path, [ids])
    assert [step["input_ids"].shape for step in feeds] == [(3, 7), (3, 1)]
    assert feeds[1]["past_key_values.0.key"].shape == (3, 2, 7, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [qwen3, gpt2, uneven_llama, without_attention, zoo("gemma2"), zoo("bloom"), zoo("opt"), zoo("gpt_oss")],
    ids=["qwen3", "gpt2", "uneven", "without_attention", "windows", "alibi", "learned_positions", "experts"],
)
def test_other_decoders_generate_the_same_tokens(make: Callable[[], Any], tmp_path: Path) -> None:
    model, path = make(), tmp_path / "decoder.onnx"
    ids, mask = left_padded_prompt()
    to_decoder_onnx(model, path)
    assert np.array_equal(decoded(path, ids, mask), generated(model, ids, mask))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_8_8", "llama_8_2", "falcon_multi_query", "gemma3"])
def test_the_latest_operators_generate_the_same_tokens(name: str, tmp_path: Path) -> None:
    model, path = ZOO[name]().model, tmp_path / "decoder.onnx"
    ids, mask = left_padded_prompt()
    assert to_decoder_onnx(model, path, options=OnnxOptions(opset=23)).onnx.opset == 23
    assert np.array_equal(decoded(path, ids, mask), generated(model, ids, mask))


@pytest.mark.slow
def test_heads_and_layers_that_are_gone_have_no_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    report = to_decoder_onnx(uneven_llama(), path)
    assert [entry.heads for entry in report.cache] == [2, 4]
    assert len(to_decoder_onnx(without_attention(), path).cache) == 1
    inputs = [value.name for value in onnxruntime.InferenceSession(str(path)).get_inputs()]
    assert inputs[3:] == ["past_key_values.0.key", "past_key_values.0.value"]


@pytest.mark.slow
def test_a_reduced_precision_is_widened_where_asked(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    report = to_decoder_onnx(model, tmp_path / "m.onnx", options=OnnxOptions(dtype="float32"))
    assert report.agreement.tokens == 60 and model.dtype == torch.bfloat16
    assert "float" in onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_inputs()[3].type


class Shifted(transformers.GPT2LMHeadModel):
    """Its generate() counts positions from one: no single run shows that."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        made = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**made, "position_ids": made["position_ids"] + 1}


@pytest.mark.slow
def test_other_tokens_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model: Any = gpt2()
    model.__class__ = Shifted
    (tmp_path / "m.onnx").write_text("before")
    with pytest.raises(Differs, match=r"At new token 1 the logits of ONNX Runtime differ from those of generate\(\)"):
        to_decoder_onnx(model, tmp_path / "m.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.onnx", "before")]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear(3, 3), "is no language model of transformers"),
        (zoo("mamba"), "returns no `past_key_values`"),
        (zoo("t5"), "export it with to_encoder_decoder_onnx"),
        (zoo("bert_masked_lm"), "doesn't run with|returns no `past_key_values`"),
    ],
)
def test_what_has_no_such_cache_is_refused(make: Callable[[], nn.Module], says: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=says):
        to_decoder_onnx(make(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_state_that_is_no_keys_and_values_is_refused() -> None:
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(ExportError, match=r"Layer 0 of It keeps a state \(LinearAttentionLayer\)"):
        cache_entries(transformers.DynamicCache(config=config), "It")


@pytest.mark.parametrize(
    "prompt", [torch.ones(3, 1, dtype=torch.long), torch.ones(3, dtype=torch.long), torch.rand(2, 4)]
)
def test_a_prompt_that_is_none_is_refused(prompt: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="give token ids"):
        to_decoder_onnx(llama(), tmp_path / "m.onnx", prompt)


def test_prompts_are_padded_on_the_left_to_several_lengths() -> None:
    ids, mask = left_padded(torch.tensor([[5, 6, 7, 8]]))
    assert ids.tolist() == [[5, 6, 7, 8], [0, 6, 7, 8], [0, 0, 7, 8]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


def run_of(*steps: list[list[float]]) -> Decoded:
    logits = tuple(np.array(step, np.float32) for step in steps)
    return Decoded(np.stack([step.argmax(-1) for step in logits], 1), logits, "a run")


def test_rows_that_part_at_a_tie_are_compared_up_to_there() -> None:
    expected = run_of([[2.0, 1.0], [1.0, 1.000001]], [[0.0, 3.0], [5.0, 0.0]])
    got = run_of([[2.0, 1.0], [1.000001, 1.0]], [[0.0, 3.0], [0.0, 5.0]])
    found = agreement(expected, got, Tolerance())
    assert (found.tokens, found.ties) == (2, 1) and "in 1 of them up to a tie" in str(found)
    with pytest.raises(Differs, match="At new token 2 the logits"):
        agreement(expected, run_of([[2.0, 1.0], [1.0, 1.000001]], [[0.0, 3.0], [5.0, 0.2]]), Tolerance())
