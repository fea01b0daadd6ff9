"""Rounding to blocks of rows: every row of a matrix gets a size that quantised formats store."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.cli.options import rounding
from depgraph.errors import PlanError

IDS = torch.arange(6)[None]


def rows(model: nn.Module) -> set[int]:
    return {p.shape[1] for p in model.parameters() if p.dim() == 2}


def planned(model: nn.Module, example: Any, keep: float, **options: Any) -> depgraph.Plan:
    return depgraph.trace(model, example).plan(importance.Magnitude(), depgraph.Target(params=keep), **options)


@pytest.mark.parametrize("scope", ["axis", "global"])
def test_rows_of_all_matrices_are_whole_blocks(scope: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 200, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=2, head_dim=48, **sizes)
    plan = planned(transformers.LlamaForCausalLM(config).eval(), IDS, 0.6, scope=scope, round_to="gguf")
    assert not plan.notes
    small = plan.apply()
    assert all(size % 32 == 0 for size in rows(small))
    assert any(p.shape[0] % 32 for p in small.parameters() if p.dim() == 2)


def test_what_was_no_whole_block_loses_a_part_even_where_the_target_is_met_without() -> None:
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 3))
    small = planned(model, torch.randn(2, 4), 0.75, round_to="gguf", protect="2.weight:0").apply()
    assert small[0].out_features in (32, 64) and small[2].out_features == 64


def test_an_axis_of_less_than_a_block_stays_whole_and_is_noted() -> None:
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 3))
    plan = planned(model, torch.randn(2, 4), 0.6, round_to="gguf-k")
    assert plan.notes[:-1] == ("axis '0.weight:0' keeps a size that round_to='gguf-k' doesn't allow",)
    assert plan.notes[-1].endswith("the smallest step, 256 of the 512 groups of axis '2.weight:0', is 49.6%")
    assert plan.apply()[2].weight.shape == (256, 20)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(PlanError, match="'ggml' must be a whole number of groups, 1 or more, or 'gguf', 'gguf-k'"):
        planned(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4), 0.5, round_to="ggml")


@pytest.mark.parametrize("text", ["0", "-8", "2.5", "ggml", ""])
def test_the_command_takes_numbers_and_names(text: str) -> None:
    assert rounding("8") == 8 and rounding("gguf-k") == "gguf-k"
    with pytest.raises(typer.BadParameter, match="is no whole number from 1, nor one of gguf, gguf-k"):
        rounding(text)


class Heads(nn.Module):
    """Attention whose code divides the width by the number of heads, and an MLP, both added to a stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.first, self.last = heads, nn.Linear(16, width), nn.Linear(width, 10)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return self.last(x + self.mlp(x))


@pytest.mark.parametrize("scope", ["axis", "global"])
@pytest.mark.parametrize("width", [96, 192])
def test_sizes_that_the_code_ties_stay_multiples_too(width: int, scope: str) -> None:
    graph = depgraph.trace(Heads(width, 3).eval(), torch.randn(2, 6, 16))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7), scope=scope, round_to=8)
    left = {name: graph[name].size - len(groups) for name, groups in plan.removal.items()}
    assert {"first.weight:0", "qkv.weight:0/within#2"} <= left.keys() and not any(size % 8 for size in left.values())
    assert 0.67 < plan.cost().params / graph.dense_cost.params <= 0.7
    assert not plan.notes and plan.apply_with_report().form == "module"


def test_a_size_that_ties_leave_no_multiple_of_is_noted() -> None:
    graph = depgraph.trace(Heads(192, 12).eval(), torch.randn(2, 6, 16))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.9), scope="axis", round_to=8)
    assert len(plan.removal["qkv.weight:0/within"]) == 1  # of 12 heads, as the width of eight more is a quarter of all
    assert plan.notes == ("axis 'qkv.weight:0/within' keeps a size that round_to=8 doesn't allow",)
