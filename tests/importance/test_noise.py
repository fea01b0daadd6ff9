"""Noise in place of data: its form and range, and that it is enough to prune with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import DataError
from importance import OptimalBrain, noise, recipes
from tests.zoo import MODULES, ZOO


def zoo_graph(name: str) -> depgraph.DependencyGraph:
    example = {**ZOO, **MODULES}[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


def test_token_ids_are_spread_over_the_table_and_masks_are_kept() -> None:
    graph = zoo_graph("llama_8_4")
    batches = noise(graph, samples=40)
    example = graph.kwargs
    assert len(batches) == -(-40 // len(example["input_ids"]))
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    assert ids.dtype == example["input_ids"].dtype
    assert 0 <= int(ids.min()) < 10
    assert 90 < int(ids.max()) < 101
    assert all(torch.equal(batch["attention_mask"], example["attention_mask"]) for batch in batches)
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_images_are_normal_and_the_seed_says_which() -> None:
    graph = zoo_graph("residual_cnn")
    batches = noise(graph, samples=64, seed=3)
    values = torch.cat([batch[0].flatten() for batch in batches])
    assert batches[0][0].shape == graph.args[0].shape
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(noise(graph, samples=64, seed=3)[1][0], batches[1][0])
    assert not torch.equal(noise(graph, samples=64, seed=4)[1][0], batches[1][0])


@pytest.mark.parametrize("name", ["residual_cnn", "llama_8_4", "t5", "clip"])
def test_noise_is_enough_to_prune_with(name: str) -> None:
    graph = zoo_graph(name)
    batches = noise(graph, samples=4)
    found = recipes.obs(batches, rounds=2).prune(graph, depgraph.Target(params=0.9))
    assert found.report is not None
    assert found.report.after.params < graph.dense_cost.params
    assert found.compensated is not None
    assert found.compensated.changed


def test_a_doubled_neuron_goes_first_without_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[2], model[0].bias[2]
    graph = depgraph.trace(model, torch.randn(16, 5))
    score = OptimalBrain(noise(graph, samples=64), damping=1e-6)(graph)["0.weight:0"]
    assert set(score.argsort()[:2].tolist()) == {2, 4}


class Named(nn.Module):
    """A positional input beside a keyword, with an additive mask."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return (x.sum(dim=-1, keepdim=True) + bias).softmax(dim=-1)


def test_floats_with_infinities_are_kept_and_arguments_go_by_name() -> None:
    bias = torch.tensor([[0.0, float("-inf")]])
    graph = depgraph.trace(Named(), (torch.randn(3, 4),), {"bias": bias})
    (batch,) = noise(graph, samples=2)
    assert batch.keys() == {"x", "bias"}
    assert torch.equal(batch["bias"], bias)


class Counted(nn.Module):
    def forward(self, count: Tensor) -> Tensor:
        return count * 2


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="no input of Counted holds floats"):
        noise(depgraph.trace(Counted(), torch.arange(3)))
    with pytest.raises(DataError, match="asked for 0 samples"):
        noise(zoo_graph("mlp"), samples=0)
