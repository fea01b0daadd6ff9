"""Signals of blocks: by hand on a stack of residual blocks, on models of any kind, and as what allocations take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import DataError, ScoreError
from importance import BlockChange, Magnitude, OutlierRatios, allocations
from importance.passages import passages
from tests.zoo import MODULES, ZOO


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3), nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Residual blocks: the first adds (0, 1) to everything, the second nothing, the third what is there once more."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(Block(2) for _ in range(3))
        self.out = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.into.weight.copy_(torch.eye(2))
            self.blocks[0].down.bias.copy_(torch.tensor([0.0, 1.0]))
            self.blocks[2].up.weight[:2] = torch.eye(2)
            self.blocks[2].down.weight[:, :2] = torch.eye(2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


X = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])


def test_influence_and_angle_by_hand() -> None:
    """METHODS.md 2.6: (1, 0) becomes (1, 1), BI 0.292893; an identity has 0, and so has a block that scales."""
    graph = depgraph.trace(Stack(), X)
    other = 1 - 3 / 10**0.5
    found = BlockChange([X])(graph)
    assert [found[f"blocks.{k}"] for k in range(3)] == pytest.approx([(0.29289322 + other) / 2, 0, 0], abs=1e-7)
    angles = BlockChange([X], "angular")(graph)
    assert angles["blocks.0"] == pytest.approx((0.25 + np.arctan(1 / 3) / np.pi) / 2, abs=1e-6)
    assert angles["blocks.1"] == pytest.approx(0, abs=1e-6)


def test_padding_does_not_count_and_batches_add_up() -> None:
    mask = torch.tensor([[1, 0]])
    model = Stack()
    graph = depgraph.trace(model, (), {"x": X, "attention_mask": torch.ones(1, 2, dtype=torch.long)})
    assert BlockChange([{"x": X, "attention_mask": mask}])(graph)["blocks.0"] == pytest.approx(0.292893, abs=1e-6)
    ones = torch.ones(1, 1, dtype=torch.long)
    halves = [{"x": X[:, k : k + 1], "attention_mask": ones} for k in range(2)]
    whole = BlockChange([{"x": X, "attention_mask": torch.ones_like(mask)}])(graph)
    assert BlockChange(halves)(graph)["blocks.0"] == pytest.approx(whole["blocks.0"])


def test_outliers_by_hand() -> None:
    model = Stack()
    with torch.no_grad():
        model.blocks[1].up.weight.copy_(torch.tensor([[1.0, 0], [1, 0], [1, 12]]))
    graph = depgraph.trace(model, X)
    found = OutlierRatios([X], times=5)(graph)
    norms = np.array([10**0.5, 2**0.5])  # of (1, 1) and (3, 1)
    scores = np.concatenate([(np.array([[1.0, 0], [1, 0], [1, 12]]) * norms).flatten(), np.zeros(6)])
    assert found["blocks.1"] == pytest.approx(100 * (scores > 5 * scores.mean()).mean())
    assert found["blocks.1"] == pytest.approx(100 / 12)
    assert found["blocks.0"] == 0


def zoo_graph(name: str) -> depgraph.DependencyGraph:
    example = {**ZOO, **MODULES}[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


@pytest.mark.parametrize("name", ["llama_8_2", "bert_masked_lm", "t5", "convnext", "mamba", "opt"])
def test_the_stream_of_blocks_of_any_kind_is_a_chain(name: str) -> None:
    """What leaves a block comes into the next, and all blocks of these models have a passage."""
    graph = zoo_graph(name)
    names = allocations.blocks(graph)
    found = list(passages(graph, names))
    assert [p.block for p in found] == names
    for one, after in zip(found, found[1:], strict=False):
        siblings = one.block.rpartition(".")[0] == after.block.rpartition(".")[0]
        assert (one.leaves == after.enters) == siblings


def test_a_block_that_changes_the_shape_counts_as_a_right_angle() -> None:
    graph = zoo_graph("resnet_basic")
    batch = graph.kwargs
    found = BlockChange([batch], "angular")(graph)
    assert found["resnet.encoder.stages.1.layers.0"] == 0.5
    assert 0 < found["resnet.encoder.stages.1.layers.1"] < 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda batches: allocations.Owl(OutlierRatios(batches)),
        lambda batches: allocations.Cfsp(BlockChange(batches, "angular")),
        lambda batches: allocations.AdaptPruner(BlockChange(batches)),
    ],
)
def test_allocations_take_them(make: Any) -> None:
    graph = zoo_graph("qwen3")
    allocated = allocations.Allocated(Magnitude(), make([graph.kwargs]))
    plan = graph.plan(allocated, depgraph.Target(params=0.8))
    assert plan.cost().params <= 0.8 * graph.dense_cost.params


def test_bad_input_is_refused() -> None:
    graph = depgraph.trace(Stack(), X)
    for make in (BlockChange, OutlierRatios):
        with pytest.raises(DataError, match="no batches"):
            make([])(graph)
        with pytest.raises(ScoreError, match="NaN or infinity"):
            make([X * float("nan")])(graph)
        with pytest.raises(ScoreError, match="has no blocks that are repeated"):
            make([X])(zoo_graph("residual_cnn"))
    with pytest.raises(ScoreError, match="unknown measure"):
        BlockChange([X], "angle")
    with pytest.raises(ScoreError, match="outliers are 0 times"):
        OutlierRatios([X], times=0)
