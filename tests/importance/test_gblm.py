"""GBLM blends Wanda's columns with the gradients of single samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import DataError, ScoreError
from importance import Activation, GradientBlend
from tests.importance.test_activation import NEURONS, _net
from tests.importance.toys import regression
from tests.zoo import ZOO

X = torch.tensor([[1.0, 1.0], [3.0, 0.0]])


def total(output: Tensor, batch: Any) -> Tensor:
    return output.sum()


def nothing(output: Tensor, batch: Any) -> Tensor:
    return 0 * output.sum()


def graph_of_two() -> depgraph.DependencyGraph:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    return depgraph.trace(model, X)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("l2", [2 * (5**0.5 + 100 * 10**0.5), 3 * (0.5**0.5 + 100)]), ("l1", [2 * (5**0.5 + 400), 3 * (0.5**0.5 + 100)])],
)
def test_the_numbers_by_hand(norm: str, expected: list[float]) -> None:
    """The gradient of the sum of outputs at W_ij is x_j: samples [1, 1] and [3, 0]; columns' mean |W| is [2, 3]."""
    graph = graph_of_two()
    for batches in ([X], [X[:1], X[1:]], (x for x in [X[1:], X[:1]])):
        assert GradientBlend(batches, total, norm)(graph)["0.weight:0"] == pytest.approx(expected)
    assert GradientBlend([X], total, norm, scale=1)(graph)["0.weight:0"][1] == pytest.approx(3 * (0.5**0.5 + 1))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_without_gradients_it_is_wanda(norm: str) -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    wanda = Activation(batches, "wanda-sp")(graph)
    for name, scores in GradientBlend(batches, nothing, norm)(graph).items():
        np.testing.assert_allclose(scores, wanda[name], rtol=1e-5)


def test_a_grouped_convolution_has_the_gradients_of_its_own_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(2, 3, 8, 8)
    graph = depgraph.trace(model, x)
    loss = lambda output, batch: output.square().sum()  # noqa: E731
    squares = torch.zeros_like(model[1].weight)
    for sample in x:
        model.zero_grad()
        loss(model(sample[None]), None).backward()
        squares += model[1].weight.grad ** 2
    element = model[1].weight.detach().abs() * 100 * squares.sqrt()
    columns = torch.stack([element[3 * (c // 2) : 3 * (c // 2) + 3, c % 2].mean() for c in range(4)])
    wanda = Activation([x], "wanda-sp")(graph)
    found = GradientBlend([x], loss)(graph)
    for axis in graph.axes:
        labels = next((m.labels for m in axis.members if m.target == "0.weight" and m.dim == 0), None)
        if labels is not None:
            expected = wanda[axis.name] + np.bincount(labels, weights=columns.numpy())
            np.testing.assert_allclose(found[axis.name], expected, rtol=1e-4)


def test_a_dead_unit_is_lowest_and_units_may_be_permuted() -> None:
    model, batches = _net()
    with torch.no_grad():
        for p in (model.gate.weight, model.gate.bias, model.up.weight, model.up.bias):
            p[2] = 0
        model.down.weight[:, 2] = 0
    before = GradientBlend(batches, total)(depgraph.trace(model, batches[0]))[NEURONS]
    assert (before.argmin(), before[2]) == (2, 0)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight.copy_(layer.weight[order].clone())
            layer.bias.copy_(layer.bias[order].clone())
        model.down.weight.copy_(model.down.weight[:, order].clone())
    after = GradientBlend(batches, total)(depgraph.trace(model, batches[0]))[NEURONS]
    assert after == pytest.approx(before[order.numpy()], rel=1e-4)


def test_a_language_model_has_scores_and_is_left_as_it_was() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    found = GradientBlend([example.kwargs])(graph)
    assert all(np.isfinite(found[a.name]).all() and found[a.name].shape == (a.size,) for a in graph.axes)
    assert all(p.requires_grad and p.grad is None for p in example.model.parameters())


@pytest.mark.parametrize(
    ("error", "batches", "loss", "message"),
    [
        (DataError, [], total, "no batches"),
        (DataError, [(torch.randn(4, 5), torch.randn(3, 5))], total, "can't be split"),
        (ScoreError, [torch.randn(4, 5)], None, "pass loss=callable"),
        (ScoreError, [torch.full((4, 5), float("nan"))], total, "NaN or infinity comes in"),
        (
            ScoreError,
            [torch.randn(4, 5)],
            lambda o, b: (o - o.detach()).sqrt().sum(),
            "infinite gradients of '3.weight'",
        ),
    ],
)
def test_what_cant_be_used_is_refused(error: Any, batches: Any, loss: Any, message: str) -> None:
    model, _, _ = regression()
    with pytest.raises(error, match=message):
        GradientBlend(batches, loss)(depgraph.trace(model, torch.randn(2, 5)))


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ScoreError, match="unknown norm over samples 'l3'"):
        GradientBlend([X], norm="l3")
    with pytest.raises(ScoreError, match="scale of gradients"):
        GradientBlend([X], scale=-1)
