"""FPGM and Mag-sp: the numbers of METHODS.md by hand, and what must hold for them on any model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import ScoreError
from importance import ColumnMagnitude, FilterDistance, Magnitude, fpgm
from tests.importance.test_activation import NEURONS, ONE_SEQUENCE, TwoHeads, _net
from tests.test_experts import WIDTH, Dense, Scattered, Sorted, Stacked
from tests.zoo import MODULES, ZOO

RAW: dict[str, Any] = {"reduction": "sum", "normalise": "none"}


def filters(values: list[list[float]]) -> depgraph.DependencyGraph:
    model = nn.Sequential(nn.Linear(len(values[0]), len(values), bias=False), nn.Linear(len(values), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values))
    return depgraph.trace(model, torch.randn(3, len(values[0])))


def test_filters_near_to_all_others_are_lowest() -> None:
    """METHODS.md 2.4: filters [1, 0], [-1, 0], [0, 2] -> [4.236, 4.236, 4.472]: signs count."""
    found = FilterDistance(**RAW)(filters([[1, 0], [-1, 0], [0, 2]]))["0.weight:0"]
    assert found == pytest.approx([2 + 5**0.5, 2 + 5**0.5, 2 * 5**0.5])


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_distances_are_the_same_in_blocks(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 4, 3, 2)
    table = torch.tensor([[0, 3], [1, -1], [5, 2]])
    rows = torch.stack([torch.cat([weight[i] if i >= 0 else 0 * weight[0] for i in row]).flatten() for row in table])
    expected = torch.cdist(rows.double(), rows.double()).sum(1)
    monkeypatch.setattr(fpgm, "PIECE", piece)
    assert fpgm.distance_sums(weight, 0, table).tolist() == pytest.approx(expected.tolist())
    assert fpgm.distance_sums(weight.transpose(0, 2), 2, table).tolist() == pytest.approx(expected.tolist())


def test_doubled_neurons_are_the_two_lowest_for_fpgm_and_not_for_magnitudes() -> None:
    """METHODS.md 8 F3: their columns differ, which the readers' weights alone say."""
    model, batches = _net()
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight.mul_(torch.tensor([1.0, 1, 1, 1, -1, 1])[:, None])
            layer.weight[1] = layer.weight[4]
            layer.bias[1] = layer.bias[4]
        model.down.weight[:, 1] *= 50
        for layer in (model.gate, model.up):
            layer.weight[[0, 2, 3, 5]] += 5 * torch.randn(4, 8)
            layer.weight[[1, 4]] += layer.weight[[0, 2, 3, 5]].mean(dim=0)
    graph = depgraph.trace(model, batches[0])
    found = FilterDistance()(graph)[NEURONS]
    assert found[1] == pytest.approx(found[4], rel=1e-6)
    assert set(np.argsort(found)[:2]) == {1, 4}
    assert ColumnMagnitude()(graph)[NEURONS].argmax() == 1
    assert Magnitude()(graph)[NEURONS].argmax() == 1


@pytest.mark.parametrize(("heads", "expected"), [(4, [1, 5**0.5, 3, 2**0.5]), (2, [1 + 5**0.5, 3 + 2**0.5])])
def test_columns_have_the_norms_of_mag_sp(heads: int, expected: list[float]) -> None:
    """METHODS.md 2.4: columns [1, 2.236068, 3, 1.414214], heads [3.236068, 4.414214]."""
    graph = depgraph.trace(TwoHeads(heads), ONE_SEQUENCE)
    axis = next(a for a in graph.axes if a.size == heads and any(m.target == "scale" for m in a.members))
    assert ColumnMagnitude()(graph)[axis.name] == pytest.approx(expected, abs=1e-6)


def test_a_grouped_convolution_reads_every_channel_with_its_own_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2))
    graph = depgraph.trace(model, torch.randn(2, 3, 8, 8))
    weight = model[1].weight.detach()
    columns = [float(weight[3 * (c // 2) : 3 * (c // 2) + 3, c % 2].norm()) for c in range(4)]
    found = ColumnMagnitude()(graph)
    read = [(a.name, m.labels) for a in graph.axes for m in a.members if m.target == "0.weight" and m.dim == 0]
    assert len(read) == 2  # the groups, and the channels of each
    for name, labels in read:
        assert found[name] == pytest.approx(np.bincount(labels, weights=columns))


@pytest.mark.parametrize("scorer", [FilterDistance(), ColumnMagnitude()])
def test_permuting_units_permutes_scores(scorer: Any) -> None:
    model, batches = _net()
    before = scorer(depgraph.trace(model, batches[0]))[NEURONS]
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight.copy_(layer.weight[order].clone())
            layer.bias.copy_(layer.bias[order].clone())
        model.down.weight.copy_(model.down.weight[:, order].clone())
    assert scorer(depgraph.trace(model, batches[0]))[NEURONS] == pytest.approx(before[order.numpy()], rel=1e-6)


@pytest.mark.parametrize("name", ["llama_8_2", "residual_cnn", "grouped_query_by_hand", "tied_weights"])
@pytest.mark.parametrize("score", ["fpgm", "mag-sp", "lamp"])
def test_every_axis_of_any_model_has_scores(name: str, score: str) -> None:
    example = (MODULES | ZOO)[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    found = importance.named(score)(graph)
    for axis in graph.axes:
        assert found[axis.name].shape == (axis.size,)
        assert np.isfinite(found[axis.name]).all()
    assert graph.plan(importance.named(score), depgraph.Target(params=0.9)).removal


@pytest.mark.parametrize("scorer", [FilterDistance(), ColumnMagnitude()])
def test_weights_that_are_not_finite_are_named(scorer: Any) -> None:
    graph = filters([[1, 0], [-1, 0], [0, 2]])
    with torch.no_grad():
        graph.model[0].weight[1, 1] = float("nan")
        graph.model[1].weight[1, 1] = float("inf")
    with pytest.raises(ScoreError, match=r"parameter '[01].weight' holds NaN or infinite values"):
        scorer(graph)


def test_columns_are_those_of_the_weight_as_it_is_used() -> None:
    """After a weight norm; the direction alone would say nothing."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)))
    with torch.no_grad():
        model[2].parametrizations.weight.original0.mul_(torch.tensor([[0.1], [1.0], [9.0]]))
    found = ColumnMagnitude()(depgraph.trace(model, torch.randn(2, 4)))["0.weight:0"]
    np.testing.assert_allclose(found, model[2].weight.detach().square().sum(dim=0).sqrt().numpy(), rtol=1e-5)


@pytest.mark.parametrize("kind", [Stacked, Dense, Scattered, Sorted])
def test_columns_of_all_experts_are_taken_together(kind: type[Stacked]) -> None:
    model = kind().eval()
    graph = depgraph.trace(model, torch.randn(9, WIDTH))
    one = next(a for a in graph.axes if any((m.target, m.dim) == ("down", 2) for m in a.members))
    expected = model.down.detach().square().sum(dim=(0, 1)).sqrt().numpy()
    np.testing.assert_allclose(ColumnMagnitude()(graph)[one.name], expected, rtol=1e-5)
