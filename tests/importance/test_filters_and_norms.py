"""Scores of weights alone that read the graph: FPGM, BN scale, Mag-sp."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.errors import ScoreError
from importance import geometric_median
from importance.norm_scales import scales_of
from tests.importance.test_activation import TwoHeads
from tests.test_experts import WIDTH as EXPERT_WIDTH
from tests.test_experts import Dense, Sorted, Stacked
from tests.zoo import MODULES, ZOO

NAMES = ["fpgm", "bn-scale", "mag-sp"]


def traced(name: str) -> depgraph.DependencyGraph:
    example = (MODULES | ZOO)[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


def mlp(*filters: list[float]) -> nn.Sequential:
    """A hidden layer with these rows."""
    model = nn.Sequential(nn.Linear(len(filters[0]), len(filters), bias=False), nn.ReLU(), nn.Linear(len(filters), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(filters))
    return model


def test_distances_are_those_of_the_raw_filters() -> None:
    """METHODS.md 2.4: filters [1, 0], [-1, 0], [0, 2] have [4.236, 4.236, 4.472], and not those of their squares."""
    graph = depgraph.trace(mlp([1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]), torch.randn(2, 2))
    found = importance.GeometricMedian(normalise="none")(graph)["0.weight:0"]
    np.testing.assert_allclose(found, [2 + 5**0.5, 2 + 5**0.5, 2 * 5**0.5])


def test_two_equal_filters_are_the_lowest_whatever_reads_them() -> None:
    """METHODS.md 8 F3: of filters that are all as far apart."""
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))
    with torch.no_grad():
        model[0].weight.copy_(nn.init.orthogonal_(torch.empty(9, 9)))
        model[0].weight[5] = model[0].weight[2]
    found = importance.GeometricMedian()(depgraph.trace(model, torch.randn(2, 9)))["0.weight:0"]
    assert found[2] == pytest.approx(found[5]) and set(np.argsort(found)[:2]) == {2, 5}


@pytest.mark.parametrize("block", [300, 1 << 23])
@pytest.mark.parametrize("name", ["residual_cnn", "llama_8_2", "grouped_query_by_hand"])
def test_distances_are_those_of_the_definition(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of any size; of heads, fused weights and kernels; columns of consumers left out."""
    monkeypatch.setattr(geometric_median, "_BLOCK", block)
    graph = traced(name)
    tensors, read = graph.tensors(), importance.consumed.consumed_dims(graph)
    found = importance.GeometricMedian(normalise="none")(graph)
    for one in graph.axes:
        makers = {(id(tensors[m.target]), m.dim): m for m in one.members if m.kind == "parameter"}
        makers = {k: m for k, m in makers.items() if tensors[m.target].ndim > 1 and k not in read} or makers
        total, present = np.zeros(one.size), np.zeros(one.size)
        for m in makers.values():
            groups = [g for g in range(one.size) if len(m.indices(g))]
            rows = [
                tensors[m.target].detach().double().index_select(m.dim, torch.as_tensor(m.indices(g))).flatten()
                for g in groups
            ]
            if len({len(r) for r in rows}) > 1:
                return
            for g, row in zip(groups, rows, strict=True):
                total[g] += sum(float((row - other).norm()) for other in rows)
                present[g] += 1
        np.testing.assert_allclose(found[one.name], total / np.maximum(present, 1), rtol=1e-5, atol=1e-6)


def test_the_columns_of_two_heads() -> None:
    """METHODS.md 2.4 and 8 F1: columns [1, 2.236068, 3, 1.414214], heads [3.236068, 4.414214]."""
    for heads, expected in ((4, [1, 5**0.5, 3, 2**0.5]), (2, [1 + 5**0.5, 3 + 2**0.5])):
        graph = depgraph.trace(TwoHeads(heads), torch.randn(1, 2, 4))
        one = next(a for a in graph.axes if a.size == heads and any(m.target == "scale" for m in a.members))
        np.testing.assert_allclose(importance.ColumnNorm()(graph)[one.name], expected, rtol=1e-6)


def test_columns_of_grouped_convolutions_belong_to_their_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2))
    graph = depgraph.trace(model, torch.randn(1, 3, 9, 9))
    weight = model[2].weight.detach()
    columns = torch.cat([part.square().sum(dim=(0, 2, 3)).sqrt() for part in weight.split(3)]).numpy()
    checked = 0
    for one in graph.axes:
        member = next((m for m in one.members if (m.target, m.dim) == ("0.weight", 0)), None)
        if member is not None:
            found = importance.ColumnNorm()(graph)[one.name]
            np.testing.assert_allclose(found, [columns[member.indices(g)].sum() for g in range(one.size)], rtol=1e-5)
            checked += 1
    assert checked


def test_columns_are_those_of_the_weight_as_it_is_used() -> None:
    """A weight norm is taken first; a scale on a column counts."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)))
    graph = depgraph.trace(model, torch.randn(2, 4))
    expected = model[2].weight.detach().square().sum(dim=0).sqrt().numpy()
    found = next(v for k, v in importance.ColumnNorm()(graph).items() if len(v) == 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [Stacked, Dense, Sorted])
def test_columns_of_all_experts_are_taken_together(kind: type[Stacked]) -> None:
    model = kind().eval()
    graph = depgraph.trace(model, torch.randn(9, EXPERT_WIDTH))
    one = next(a for a in graph.axes if any((m.target, m.dim) == ("down", 2) for m in a.members))
    expected = model.down.detach().square().sum(dim=(0, 1)).sqrt().numpy()
    np.testing.assert_allclose(importance.ColumnNorm()(graph)[one.name], expected, rtol=1e-5)


class Norms(nn.Module):
    """Normalisations, fused and written out, one after the other; names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 3)
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Parameter(torch.rand(12) + 0.5) for _ in range(6))
        self.plain, self.gain = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12, 1) + 0.5)
        self.offset = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = F.layer_norm(x, (x.shape[-1],), self.a, self.offset)
        x = F.rms_norm(x, (x.shape[-1],), self.b)
        x = (1 + self.c) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = self.d * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = self.e * ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()) + self.offset
        x = F.normalize(x, dim=-1).to(torch.float64).float() * self.f
        x = F.group_norm(x.transpose(-1, -2), 3).transpose(-1, -2) * self.plain * torch.sigmoid(x)
        x = F.batch_norm(x.transpose(-1, -2), self.offset.detach(), torch.ones(x.shape[-1]), self.gain[:, 0]).transpose(
            -1, -2
        )
        return self.leave(torch.tanh(x * self.plain))


def test_scales_are_found_by_what_reads_them() -> None:
    model = Norms()
    graph = depgraph.trace(model, torch.randn(2, 7, 5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: scale for parameter, scale in scales_of(graph)}
    assert set(found) == {"a", "b", "c", "d", "e", "f", "gain"}
    torch.testing.assert_close(found["c"], 1 + model.c.detach())
    sizes = np.mean([scale.abs().flatten().numpy() for scale in found.values()], axis=0)
    scores = importance.NormScale()(graph)
    assert [one.size for one in graph.axes] == [3, 4]  # the group norm keeps its three groups apart
    for one in graph.axes:
        labels = next(m.labels for m in one.members if m.target == "enter.bias")
        expected = [sizes[labels == group].mean() for group in range(one.size)]
        np.testing.assert_allclose(scores[one.name], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["resnet_basic", "vit", "llama_8_2", "gemma2", "t5", "convnext", "group_norm_cnn", "qwen3"]
)
def test_the_scales_of_whole_architectures(name: str) -> None:
    """Every parameter of one dim that isn't a bias or a layer scale is one; each is found, and nothing else."""
    graph = traced(name)
    model = graph.model
    names = {id(parameter): n for n, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter, _ in scales_of(graph)}
    held = {n for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith(("bias", "layer_scale_parameter"))}
    assert found == held and found


def test_an_axis_without_a_norm_goes_last_by_the_size_of_its_weights() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    ).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0, 9.0]))
    graph = depgraph.trace(model, torch.randn(1, 3, 9, 9))
    found = importance.NormScale()(graph)
    np.testing.assert_allclose(found["0.weight:0"], [3, 1, 0.5, 0, 2, 9])
    np.testing.assert_allclose(importance.NormScale(2)(graph)["0.weight:0"], [9, 1, 0.25, 0, 4, 81])
    last = found["3.weight:0"]
    assert last.min() > 9
    np.testing.assert_array_equal(np.argsort(last), np.argsort(importance.Magnitude()(graph)["3.weight:0"]))
    plan = graph.plan(importance.NormScale(), depgraph.Target(params=0.8))
    assert set(plan.removal) == {"0.weight:0"} and set(plan.removal["0.weight:0"]) <= {3, 2, 1, 4}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["residual_cnn", "llama_8_2", "gpt2", "tied_weights", "mixtral", "lstm_projected"])
def test_every_axis_of_any_model_is_scored(name: str, model: str) -> None:
    graph = traced(model)
    found = depgraph.scoring.checked_scores(graph, importance.named(name))
    assert found.keys() == {one.name for one in graph.axes if one.prunable.any()} | found.keys()
    assert all((scores >= 0).all() and scores.max() > 0 for scores in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_scores_follow_the_units_when_these_are_permuted(name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.uniform_(0.1, 2)
    order, other = torch.randperm(8), copy.deepcopy(model)
    with torch.no_grad():
        for mine, theirs in ((other[0], model[0]), (other[1], model[1])):
            mine.weight.copy_(theirs.weight[order])
            mine.bias.copy_(theirs.bias[order])
        other[3].weight.copy_(model[3].weight[:, order])
    found = [importance.named(name)(depgraph.trace(m, torch.randn(2, 5)))["0.weight:0"] for m in (model, other)]
    np.testing.assert_allclose(found[1], found[0][order.numpy()], rtol=1e-6)


@pytest.mark.parametrize(("name", "at", "power"), [("fpgm", 0, 1), ("mag-sp", 2, 1)])
def test_one_tensor_times_c_counts_its_term_times_c(name: str, at: int, power: int) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = depgraph.trace(model, torch.randn(2, 5))
    scorer: Any = importance.named(name, normalise="none")
    before = scorer(graph)["0.weight:0"]
    with torch.no_grad():
        model[at].weight *= 3
    np.testing.assert_allclose(scorer(graph)["0.weight:0"], 3**power * before, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_finite_are_named(name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    graph = depgraph.trace(model, torch.randn(2, 5))
    with torch.no_grad():
        model[2].weight[0, 1] = float("nan")
    with pytest.raises(ScoreError, match="parameter '2.weight' holds NaN or infinite values"):
        importance.named(name)(graph)


@pytest.mark.parametrize("name", NAMES)
def test_weights_without_values_and_stale_graphs_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(ScoreError, match="'0.weight' .*meta device"):
        importance.named(name)(graph)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    graph = depgraph.trace(model, torch.randn(2, 5))
    model[2].weight = nn.Parameter(torch.randn(3, 6))
    with pytest.raises(ScoreError, match="'2.weight' .*trace the model again"):
        importance.named(name)(graph)


def test_powers_and_names_are_checked() -> None:
    with pytest.raises(ScoreError, match="power p"):
        importance.NormScale(0)
    with pytest.raises(ScoreError, match="unknown reduction"):
        importance.GeometricMedian("men")
    with pytest.raises(ScoreError, match="unknown normalisation"):
        importance.ColumnNorm(normalise="men")
