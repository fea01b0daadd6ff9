"""LoRAPrune: the estimate of METHODS.md 2.20, on models with adapters of peft."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import ScoreError
from importance import LoraPrune
from importance.lora import Adapter, adapters_of
from tests.zoo import ZOO


def test_the_estimate_by_hand() -> None:
    """METHODS.md 2.20: A = [[1, 2]], B = [[1], [0]], dA = [[.5, 0]], dB = [[1], [2]] -> G = [[1, 2], [1, 4]]."""
    a, b = nn.Parameter(torch.tensor([[1.0, 2]])), nn.Parameter(torch.tensor([[1.0], [0]]))
    a.grad, b.grad = torch.tensor([[0.5, 0]]), torch.tensor([[1.0], [2]])
    adapter = Adapter(torch.zeros(2, 2), a, b, 3.0, False)
    assert adapter.gradient().tolist() == [[1, 2], [1, 4]]
    assert adapter.delta().tolist() == [[3, 6], [0, 0]]
    turned = Adapter(torch.zeros(2, 2), a, b, 3.0, True)
    assert turned.gradient().tolist() == [[1, 1], [2, 4]]


class Two(nn.Module):
    """Two linear maps without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def adapted(model: nn.Module, targets: list[str], rank: int = 2) -> nn.Module:
    found = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=6, target_modules=targets))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return found


def trained(model: nn.Module, x: Tensor, factor: float = 1.0) -> None:
    model.zero_grad()
    (factor * model(x).square().sum()).backward()


def unit(scores: Tensor) -> Tensor:
    return scores / scores.norm()


def expected(model: Any) -> Tensor:
    """A step's scores of the hidden neurons of `Two`: rows of the first map and columns of the last, each of norm 1."""
    found = []
    for layer in (model.base_model.model.first, model.base_model.model.last):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        estimate = b.grad @ a + b @ a.grad - b.grad @ a.grad
        found.append(((layer.base_layer.weight + layer.scaling["default"] * b @ a) * estimate).abs().detach())
    return unit(found[0].sum(1)) + unit(found[1].sum(0))


def test_scores_are_a_moving_average_of_normalised_saliencies() -> None:
    model = adapted(Two(), ["first", "last"])
    x = torch.randn(5, 3)
    graph = depgraph.trace(model, x)
    scorer = LoraPrune(graph)
    average = torch.zeros(4)
    for factor in (1.0, 2.0, -1.0):
        trained(model, x, factor)
        scorer.update()
        average = 0.9 * average + 0.1 * expected(model)
    (name,) = (a.name for a in graph.axes if a.size == 4)
    assert scorer(graph)[name] == pytest.approx(average.tolist(), rel=1e-4)
    assert scorer.updates == 3
    assert model.base_model.model.first.base_layer.weight.grad is None


def test_zero_gradients_score_zero_and_dead_units_are_lowest() -> None:
    model = adapted(Two(), ["first", "last"])
    graph = depgraph.trace(model, torch.randn(5, 3))
    (name,) = (a.name for a in graph.axes if a.size == 4)
    scorer = LoraPrune(graph, decay=0.0)
    trained(model, torch.randn(5, 3), 0.0)
    scorer.update()
    assert scorer(graph)[name].tolist() == [0] * 4
    first, last = model.base_model.model.first, model.base_model.model.last
    with torch.no_grad():
        for dead in (first.base_layer.weight[2], first.lora_B["default"].weight[2]):
            dead.zero_()
        for dead in (last.base_layer.weight[:, 2], last.lora_A["default"].weight[:, 2]):
            dead.zero_()
    trained(model, torch.randn(5, 3))
    scorer.update()
    found = scorer(graph)[name]
    assert (found.argmin(), found[2]) == (2, 0)


def test_a_language_model_is_pruned_by_what_its_adapters_learn() -> None:
    example = ZOO["llama_8_2"]()
    model = adapted(example.model, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    graph = depgraph.trace(model, example.args, example.kwargs)
    scorer = LoraPrune(graph)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        model(**example.kwargs, labels=example.kwargs["input_ids"]).loss.backward()
        scorer.update()
        optimiser.step()
    found = scorer(graph)
    for axis in graph.axes:
        assert found[axis.name].shape == (axis.size,)
        assert np.isfinite(found[axis.name]).all()
    pruned = graph.plan(scorer, depgraph.Target(params=0.9)).apply()
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert pruned(**example.kwargs).logits.isfinite().all()


def test_adapters_of_a_turned_weight_and_of_convolutions_are_found() -> None:
    example = ZOO["gpt2"]()
    model = peft.get_peft_model(example.model, peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    found = list(adapters_of(model))
    assert found
    assert all(a.turned and a.delta().shape == a.weight.shape for a in found)
    convolution = adapted(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)), ["0"])
    (adapter,) = adapters_of(convolution)
    merged = convolution.base_model.model[0].get_delta_weight("default")
    assert torch.allclose(adapter.delta(), merged, atol=1e-6)


def test_adapters_of_tables_are_found_and_ranks_are_no_axes() -> None:
    example = ZOO["llama_8_2"]()
    tables = [n for n, m in example.model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    model = peft.get_peft_model(
        example.model, peft.LoraConfig(r=3, target_modules=tables, init_lora_weights=False)
    ).eval()
    table = model.base_model.model.model.embed_tokens
    found = {id(adapter.weight): adapter for adapter in adapters_of(model)}[id(table.base_layer.weight)]
    torch.testing.assert_close(found.delta(), table.get_delta_weight("default").detach())
    graph = depgraph.trace(model, example.args, example.kwargs)
    tracker = LoraPrune(graph)
    model(**example.kwargs).logits.square().mean().backward()
    tracker.update()
    ranks = {a.name for a in graph.axes if all("lora" in m.target for m in a.members)}
    assert ranks and ranks.isdisjoint(tracker.axes)
    plan = graph.plan(tracker, depgraph.Target(params=0.9), only=tracker.axes)
    assert plan.removal and ranks.isdisjoint(plan.removal)


def test_what_cant_be_used_is_refused() -> None:
    plain = depgraph.trace(Two(), torch.randn(5, 3))
    with pytest.raises(ScoreError, match="Two has no LoRA adapters on the weights of its axes"):
        LoraPrune(plain)
    model = adapted(Two(), ["first"])
    graph = depgraph.trace(model, torch.randn(5, 3))
    with pytest.raises(ScoreError, match="decay"):
        LoraPrune(graph, decay=1.0)
    scorer = LoraPrune(graph)
    with pytest.raises(ScoreError, match="no scores yet"):
        scorer(graph)
    with pytest.raises(ScoreError, match="no adapter has a gradient"):
        scorer.update()
    trained(model, torch.full((5, 3), float("nan")))
    with pytest.raises(ScoreError, match="gradients of its adapter hold NaN"):
        scorer.update()
    assert scorer.updates == 0
    trained(model, torch.randn(5, 3))
    scorer.update()
    with pytest.raises(ScoreError, match="other axes"):
        scorer(plain)
