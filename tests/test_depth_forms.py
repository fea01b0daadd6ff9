"""Sublayers and blocks of models whose code is unusual are left out of the module itself, and its config follows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import depgraph
import exporters


def wide(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Scaled(nn.Module):
    """A layer whose scales are its own parameters, beside a part that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = wide(), wide(), nn.LayerNorm(8)
        self.scale = nn.ParameterList(nn.Parameter(torch.rand(8)) for _ in range(2))
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.gate) * (self.scale[0] * self.first(self.norm(x)))
        return x + self.second(x) * self.scale[1]


class Raw(nn.Module):
    """A layer that multiplies with weights that no module of its own holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(8), wide()
        self.up, self.down = nn.Parameter(torch.randn(12, 8) / 3), nn.Parameter(torch.randn(8, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.linear(F.gelu(F.linear(self.norm(x), self.up)), self.down)
        return x + self.second(x)


@pytest.mark.parametrize("layer", [Scaled, Raw])
def test_parameters_that_a_layer_itself_multiplies_with_go_with_its_sublayer(
    layer: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), layer(), layer(), nn.Linear(8, 3)).eval(), torch.randn(2, 5, 4)
    before, graph = {name: tensor.clone() for name, tensor in model.state_dict().items()}, depgraph.trace(model, x)
    for number, branch in enumerate(graph.branches[:2]):
        report = graph.cut_plan(branches=[branch.name]).apply_with_report(form="module")
        shorter = report.model
        assert report.check is not None and report.check.error == 0 and not report.check.vacuous
        assert dict(shorter.named_parameters()).keys() == dict(model.named_parameters()).keys() - set(branch.parameters)
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(shorter)))(x), shorter(x))
        depgraph.save(shorter, tmp_path / str(number))
        assert torch.equal(depgraph.load(tmp_path / str(number), copy.deepcopy(model))(x), shorter(x))
        shorter.train()(x).sum().backward()
        assert all(p.grad is not None for p in shorter.parameters())
    exporters.to_onnx(shorter.eval(), (x,), tmp_path / "shorter.onnx")
    held = onnx_ir.load(tmp_path / "shorter.onnx").graph.initializers.values()
    sizes = [tuple(sorted(value.shape.numpy())) for value in held if value.shape and len(value.shape) > 1]
    assert sorted(sizes) == sorted(tuple(sorted(p.shape)) for p in shorter.parameters() if p.ndim > 1)
    plan = graph.cut_plan(branches=[graph.branches[0].name])
    plan.apply_()
    assert model.state_dict().keys() == before.keys() - set(graph.branches[0].parameters)


def test_a_cut_in_place_that_fails_puts_parameters_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), Scaled(), nn.Linear(8, 3)).eval(), torch.randn(2, 4)
    expected, names = model(x), list(model.state_dict())
    graph = depgraph.trace(model, x)

    def fail(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("depgraph.cutting.applying.check_shorter", fail)
    with pytest.raises(KeyboardInterrupt):
        graph.cut_plan(branches=[graph.branches[0].name]).apply_()
    assert torch.equal(model(x), expected) and list(model.state_dict()) == names


def test_what_happens_to_be_as_many_as_the_layers_is_no_count() -> None:
    config = MptConfig(d_model=32, n_heads=4, n_layers=4, vocab_size=64, max_seq_len=32)
    model = MptForCausalLM(config).eval()  # it keeps its number of heads beside the layers
    graph = depgraph.trace(model, (), {"input_ids": torch.randint(0, 64, (2, 6))})
    report = graph.cut_plan(branches=[graph.blocks[1].name]).apply_with_report(form="module")
    shorter: Any = report.model
    assert shorter.config.n_layers == 3 and shorter.config.n_heads == shorter.transformer.num_heads == 4


def test_lists_that_a_config_computes_from_its_count_follow_and_come_back(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
    model: Any = BeitForImageClassification(BeitConfig(num_hidden_layers=4, patch_size=16, **sizes)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    names, expected = list(model.config.stage_names), model(pixels).logits
    shorter: Any = depgraph.trace(model, pixels).cut_plan(branches=["beit.layers.1", "beit.layers.2"]).apply()
    assert depgraph.save(shorter, tmp_path / "saved").format == "plain"
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.allclose(again(pixels).logits, shorter(pixels).logits, atol=1e-5)
    assert again.config.stage_names == names[:-2] and model.config.stage_names == names
    assert torch.equal(model(pixels).logits, expected)


@pytest.mark.parametrize("gone", [[0], [0, 1]])
def test_padding_counts_where_no_attention_of_a_kind_is_left(gone: list[int]) -> None:
    types = ["full_attention"] * len(gone) + ["sliding_attention"] * 2
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    config = Gemma3TextConfig(
        num_hidden_layers=len(types),
        layer_types=types,
        sliding_window=64,
        vocab_size=64,
        num_key_value_heads=1,
        **sizes,
    )
    torch.manual_seed(0)
    model: Any = Gemma3ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(5, 60, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    graph = depgraph.trace(model, (), {"input_ids": ids})
    shorter: Any = graph.cut_plan(branches=[f"model.layers.{k}.self_attn" for k in gone]).apply(form="module")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = shorter(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        begun = shorter(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1])
        last = shorter(
            input_ids=ids[:, -1:],
            attention_mask=mask,
            position_ids=places[:, -1:],
            past_key_values=begun.past_key_values,
        ).logits
    assert begun.past_key_values.get_seq_length() == ids.shape[1]
    assert torch.allclose(last[:, 0], whole[:, -1], atol=1e-4)


def test_a_block_that_also_computes_what_nothing_reads_is_a_block(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    linear = {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    types = ["linear_attention", "linear_attention", "full_attention"]  # linear ones make a state for a cache
    config = Qwen3NextConfig(
        num_hidden_layers=3,
        layer_types=types,
        vocab_size=64,
        num_key_value_heads=1,
        num_experts=0,
        **linear,
        **sizes,
    )
    model: Any = Qwen3NextForCausalLM(config).eval()
    graph = depgraph.trace(model, (), {"input_ids": torch.randint(0, 64, (2, 6)), "use_cache": False})
    assert [block.name for block in graph.blocks] == [f"model.layers.{k}" for k in range(3)]
    shorter: Any = graph.cut_plan(branches=["model.layers.0"]).apply(form="module")
    assert shorter.config.layer_types == types[1:]
    assert depgraph.save(shorter, tmp_path / "saved").format == "plain"


@pytest.mark.parametrize("first", [0, 2])
def test_positions_of_layers_in_a_config_follow(first: int, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    config = Glm4MoeConfig(
        num_hidden_layers=4, vocab_size=64, num_key_value_heads=1, first_k_dense_replace=2, **experts, **sizes
    )
    model: Any = Glm4MoeForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 6))
    graph = depgraph.trace(model, (), {"input_ids": ids})
    shorter: Any = graph.cut_plan(branches=[f"model.layers.{first}"]).apply(form="module")
    assert shorter.config.num_hidden_layers == 3 and shorter.config.first_k_dense_replace == (1 if first == 0 else 2)
    assert depgraph.save(shorter, tmp_path / "saved").format == "plain"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.allclose(again(ids).logits, shorter(ids).logits, atol=1e-5)


def test_a_config_with_an_infinite_number_follows() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    model: Any = Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=3, vocab_size=64, chunk_size=8, **sizes)).eval()
    assert model.config.time_step_limit[1] == float("inf")
    graph = depgraph.trace(model, (), {"input_ids": torch.randint(0, 64, (2, 8)), "use_cache": False})
    shorter: Any = graph.cut_plan(branches=[graph.blocks[1].name]).apply(form="module")
    assert shorter.config.num_hidden_layers == 2
