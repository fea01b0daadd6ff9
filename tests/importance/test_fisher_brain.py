"""Optimal brain surgery in the loss's curvature: its formula, what holds for greedy losses, and that any model has scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import ScoreError
from importance import FisherBrain, Surgeon
from importance.factors import Side
from importance.problems import damped
from tests.importance.test_activation import NEURONS, _net
from tests.importance.test_surgeon import Written, squared
from tests.zoo import ZOO


def _grouped() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    return nn.Sequential(*layers), torch.randn(6, 3, 9, 9)


def _stacked() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 30), nn.Tanh(), nn.Linear(30, 2)), torch.randn(40, 5)


@pytest.mark.parametrize("make", [_grouped, _stacked])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_alone_a_group_costs_what_llm_surgeon_says_of_its_columns(make: Any, damping: float) -> None:
    """Whether G is held or W'GW, which of them is smaller: maps with more outputs than columns and with fewer."""
    model, x = make()
    graph = depgraph.trace(model, x)
    batches = [x[:2], x[2:]]
    alone = FisherBrain(batches, squared, damping, rounds=1)(graph)
    columns = Surgeon(batches, squared, damping, sides="columns")(graph)
    for axis in graph.axes:
        if axis.prunable.any():
            np.testing.assert_allclose(alone[axis.name], columns[axis.name], rtol=1e-3)


def test_greedy_losses_add_up_to_what_groups_cost_together() -> None:
    model, x = _stacked()
    graph = depgraph.trace(model, x)
    found = FisherBrain([x], squared, rounds=99)(graph)["2.weight:0"]
    inputs = model[:4](x)
    output = model[4](inputs)
    (back,) = torch.autograd.grad(squared(output, None), output)
    with_one = torch.cat([inputs, torch.ones(len(x), 1)], 1).detach().double()
    weight = torch.cat([model[4].weight, model[4].bias[:, None]], 1).detach().double()
    a, g = (damped(t.T @ t / len(t), 0.01) for t in (with_one, back.double() * len(x)))
    order, labels = np.argsort(found, kind="stable"), np.full(31, -1)
    labels[order[:4]] = 0
    (together,) = Side(weight.T, a, g).costs(labels, 1).tolist()
    assert found[order[:4]].sum() == pytest.approx(together, rel=1e-3)
    alone = FisherBrain([x], squared, rounds=1)(graph)["2.weight:0"]
    assert found[order[3]] > alone[order[3]]


def test_what_is_only_multiplied_by_what_is_computed_costs_what_its_rows_do() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    found, rows = (score([example.kwargs])(graph) for score in (FisherBrain, Surgeon))
    read = Surgeon([example.kwargs], sides="columns")(graph)
    pairs = [axis.name for axis in graph.axes if all(member.dim == 0 for member in axis.members)]
    assert pairs == ["model.layers.0.self_attn.q_proj.weight:0/within#2"]  # the widths of queries and keys
    for name in pairs:
        np.testing.assert_allclose(found[name], rows[name], rtol=1e-3)
        np.testing.assert_allclose(found[name], read[name], rtol=1e-3)


def test_it_does_not_matter_how_a_product_is_written() -> None:
    x = torch.randn(3, 5, 4)
    graphs = [depgraph.trace(Written(how), x) for how in ("matrix", "stored turned", "convolution")]
    first, *others = (next(iter(FisherBrain([x], squared)(graph).values())) for graph in graphs)
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


def test_batches_may_be_parted_and_the_loss_scaled() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    whole = FisherBrain([torch.cat(batches)], squared)(graph)[NEURONS]
    assert FisherBrain(batches, squared)(graph)[NEURONS] == pytest.approx(whole, rel=1e-2)
    tiny = FisherBrain([torch.cat(batches)], lambda output, batch: 1e-20 * squared(output, batch))(graph)[NEURONS]
    assert tiny == pytest.approx(1e-40 * whole, rel=1e-3, abs=0)


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in ({"damping": -1.0}, {"rounds": 0}):
        with pytest.raises(
            ScoreError, match="damping must be a number of at least 0 and rounds a whole one of at least 1"
        ):
            FisherBrain([torch.randn(2, 5)], squared, **wrong)
    model, x = _stacked()
    with pytest.raises(ScoreError, match="singular"):
        FisherBrain([x[:3]], squared, damping=0.0)(depgraph.trace(model, x))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(x)[0])


@pytest.mark.parametrize("score", [FisherBrain, Surgeon])
def test_weights_within_a_recurrent_layer_count_in_every_precision(score: Any) -> None:
    """In float32 a library runs the whole layer as one call, in which no product could be seen."""
    torch.manual_seed(0)
    model, x = _Recurrent().eval(), torch.randn(4, 7, 6)
    found = []
    for dtype in (torch.float32, torch.float64):
        model, given = model.to(dtype), x.to(dtype)
        graph = depgraph.trace(model, (given,))
        found.append(score([given], lambda output, batch: output.square().mean())(graph))
    single, double = found
    assert single.keys() == double.keys()
    for axis, values in double.items():
        np.testing.assert_allclose(single[axis], values, rtol=1e-3)
    assert torch.backends.mkldnn.enabled
