"""What the loss does when one axis alone loses groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import depgraph
from depgraph.errors import DataError, NothingToPrune, ScoreError
from importance.sensitivity import Probing, sensitivity


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(output, batch[1])


def net() -> tuple[depgraph.DependencyGraph, list[tuple[torch.Tensor, torch.Tensor]]]:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 3)).eval()
    batches = [(torch.randn(4, 5), torch.randn(4, 3)) for _ in range(2)]
    return depgraph.trace(model, batches[0][:1]), batches


def test_changes_are_those_of_the_model_really_cut() -> None:
    graph, batches = net()
    scores = {axis.name: torch.arange(axis.size).flip(0).numpy() for axis in graph.axes}
    found = sensitivity(graph, batches, loss, Probing(scores, shares=(0.25, 0.5)))
    dense = sum(float(loss(graph.model(x).detach(), (x, y))) for x, y in batches) / 2
    assert found.loss == pytest.approx(dense, rel=1e-5)
    assert [curve.axis for curve in found.curves] == [axis.name for axis in graph.axes]
    for curve in found.curves:
        size = graph[curve.axis].size
        for share, change in zip(curve.shares, curve.changes, strict=True):
            gone = range(size - round(share * size), size)
            cut = graph.cut_plan({curve.axis: gone}).apply()
            after = sum(float(loss(cut(x).detach(), (x, y))) for x, y in batches) / 2
            assert change == pytest.approx(after - dense, abs=1e-5)


def test_a_language_model_needs_no_loss_and_stays_as_it_is() -> None:
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = depgraph.trace(model, (), {"input_ids": torch.randint(0, 30, (2, 5))})
    batches = [{"input_ids": torch.randint(0, 30, (2, 7))}]
    found = sensitivity(graph, batches, probing=Probing(shares=(0.5,), axes=("*.gate_proj.weight:0",)))
    assert len(found.curves) == 2 and all(curve.shares == (0.5,) for curve in found.curves)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_most_spreads_what_is_tried() -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])
    graph = depgraph.trace(model, torch.randn(2, 6))
    batches = [(torch.randn(2, 6), torch.randn(2, 6))]
    tried = [curve.axis for curve in sensitivity(graph, batches, loss, Probing(most=3)).curves]
    assert tried == [graph.axes[k].name for k in (0, 2, 4)]


def test_a_change_that_is_not_finite_is_none() -> None:
    graph, batches = net()

    def fragile(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.where(
            (output - graph.model(batch[0])).abs().max() > 1e-6, torch.tensor(float("inf")), output.sum()
        )

    found = sensitivity(graph, batches, fragile, Probing(shares=(0.5,)))
    assert all(curve.changes == (None,) for curve in found.curves)


def test_bad_input_is_one_sentence() -> None:
    graph, batches = net()
    with pytest.raises(DataError, match="no batches"):
        sensitivity(graph, [], loss)
    with pytest.raises(NothingToPrune, match="no axis to try"):
        sensitivity(graph, batches, loss, Probing(axes=("nowhere*",)))
    with pytest.raises(ScoreError, match="loss of the whole model is nan"):
        sensitivity(graph, batches, lambda output, batch: output.sum() * float("nan"))
    for shares in ((), (0.0,), (0.5, 1.0)):
        with pytest.raises(ScoreError, match="above 0 and below 1"):
            Probing(shares=shares)
    with pytest.raises(ScoreError, match="most=0"):
        Probing(most=0)
