"""STUN: experts that are alike are merged, on distances by hand and on models with routers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
from depgraph.errors import DataError, NothingToPrune, ScoreError
from importance import ExpertClusters, averaged, clusters_below, clusters_of, merges
from tests.test_expert_stacks import Looped
from tests.test_experts import EXPERTS, PICKED, WIDTH, Dense, Scattered, Sorted, Stacked
from tests.zoo import ZOO

FAR = np.array([[np.inf, 1, 5], [1, np.inf, 5], [5, 5, np.inf]])


def test_the_clusters_by_hand() -> None:
    """METHODS.md 2.27: threshold 2 -> {0, 1}, {2}; there are as many experts after as clusters."""
    assert clusters_below(FAR, 2) == [[0, 1], [2]]
    assert clusters_of(FAR, 2) == [[0, 1], [2]]
    assert clusters_below(FAR, 5.1) == clusters_of(FAR, 1) == [[0, 1, 2]]
    assert clusters_below(FAR, 1) == clusters_of(FAR, 3) == [[0], [1], [2]]
    for count in (0, 4):
        with pytest.raises(ScoreError, match=f"3 experts can't be in {count} clusters"):
            clusters_of(FAR, count)


def test_clusters_are_as_far_apart_as_their_farthest_pair() -> None:
    """On a line at 0, 1, 2.1, 3.3: by nearest pairs 2.1 would join {0, 1} first; its farthest pair is 2.1 apart, 3.3 is 1.2."""
    at = np.array([0, 1, 2.1, 3.3])
    distances = np.abs(at[:, None] - at[None])
    assert clusters_of(distances, 2) == [[0, 1], [2, 3]]
    assert [m.distance for m in merges(distances)] == pytest.approx([1, 1.2, 3.3])


def test_the_expert_nearest_to_the_mean_of_its_cluster_stays() -> None:
    weights = np.array([[0.0], [1.0], [1.2], [9.0]])
    distances = np.abs(weights - weights.T)
    found = list(merges(distances, weights @ weights.T))
    assert [(m.kept, m.lost) for m in found] == [(2, 1), (2, 0), (2, 3)]  # of two, the larger
    assert [(m.kept, m.lost) for m in merges(distances)] == [(1, 2), (0, 1), (0, 3)]


@pytest.mark.parametrize("seed", range(4))
def test_merges_follow_the_experts_when_these_are_permuted(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows, weights, order = (
        random.normal(size=(7, 4)),
        random.normal(size=(7, 90)),
        random.permutation(7),
    )
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    found = [(m.kept, m.lost) for m in merges(distances, weights @ weights.T)]
    turned = merges(distances[np.ix_(order, order)], weights[order] @ weights[order].T)
    assert [(int(order[m.kept]), int(order[m.lost])) for m in turned] == found


def test_a_cluster_may_be_averaged_instead_of_one_of_it_kept() -> None:
    model = Stacked().eval()
    graph = depgraph.trace(model, torch.randn(9, WIDTH))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clusters = [[0, 3, 5], [1, 4], [2]]
    changed, stays = averaged(graph, experts_axis(graph, "router.weight"), clusters)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(changed) == {"router.weight", "router.bias", "up", "down", "bias"}
    experts = torch.cat([before[n].flatten(1) for n in ("up", "down", "bias")], dim=1)
    apart = (experts[clusters[0]] - experts[clusters[0]].mean(dim=0)).norm(dim=1)
    assert stays[0] == clusters[0][int(apart.argmin())] and stays[1] in (1, 4) and stays[2] == 2
    for name, tensor in changed.items():
        for expert, cluster in zip(stays, clusters, strict=True):
            torch.testing.assert_close(tensor[expert], before[name][cluster].mean(dim=0))
        torch.testing.assert_close(tensor[2], before[name][2])
    with pytest.raises(ScoreError, match="every group of .* must be in one cluster"):
        averaged(graph, experts_axis(graph, "router.weight"), [[0, 1]])


def experts_axis(graph: depgraph.DependencyGraph, router: str) -> str:
    return next(a.name for a in graph.axes if any(m.target == router and m.dim == 0 for m in a.members))


@pytest.mark.parametrize("make", [Stacked, Dense, Scattered, Sorted])
def test_experts_with_equal_rows_in_the_router_go_first(make: type[Stacked]) -> None:
    model = make()
    with torch.no_grad():
        model.router.weight[4] = model.router.weight[1]
        for tensor in (model.up, model.down, model.bias):
            tensor[4] = 3 * tensor[1]
    graph = depgraph.trace(model, torch.randn(5, WIDTH))
    name = experts_axis(graph, "router.weight")
    found = ExpertClusters()(graph)
    assert found[name].argmin() in (1, 4)
    assert found[name].min() == pytest.approx(0, abs=1e-6)
    assert len(np.unique(found[name])) == EXPERTS
    rows = model.router.weight.detach().double()
    distances = torch.cdist(rows, rows).numpy()
    for count in range(1, EXPERTS):
        stays = set(np.argsort(found[name])[EXPERTS - count :].tolist())
        assert [len(stays & set(cluster)) for cluster in clusters_of(distances, count)] == [1] * count


def test_experts_chosen_for_the_same_tokens_are_near() -> None:
    model, x = Stacked(), torch.randn(40, WIDTH)
    graph = depgraph.trace(model, torch.randn(5, WIDTH))
    name = experts_axis(graph, "router.weight")
    _, index = model.picked(x)
    counts = np.zeros((EXPERTS, EXPERTS))
    for one, other in index.tolist():
        counts[one, other] += 1
        counts[other, one] += 1
    assert PICKED == 2
    expected = list(merges(-counts / counts.mean()))
    for batches in ([x], [x[:7], x[7:]]):
        found = ExpertClusters(batches, router=0.0, coactivation=1.0)(graph)[name]
        assert found.min() == pytest.approx(expected[0].distance)
        assert found.argmin() in (expected[0].kept, expected[0].lost)


def test_the_same_is_seen_where_the_code_goes_by_what_was_chosen() -> None:
    torch.manual_seed(0)
    one, other = Stacked(), Looped()
    other.load_state_dict(one.state_dict())
    found = []
    for model in (one.eval(), other.eval()):
        graph = depgraph.trace(model, torch.ones(5, WIDTH).cumsum(0) - 3)
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(n, WIDTH, generator=generator) for n in (40, 7)]
        found.append(ExpertClusters(batches, coactivation=1.0)(graph)[experts_axis(graph, "router.weight")])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_language_model_loses_experts(name: str) -> None:
    example = ZOO[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    for scorer in (ExpertClusters(), ExpertClusters([example.kwargs], coactivation=1.0)):
        found = scorer(graph)
        assert all(found[a.name].shape == (a.size,) and np.isfinite(found[a.name]).all() for a in graph.axes)
    removal = graph.plan(ExpertClusters(), depgraph.Target(params=0.95)).removal
    assert removal


def test_what_cant_be_used_is_refused() -> None:
    with pytest.raises(ScoreError, match="one of them more"):
        ExpertClusters(router=0.0)
    with pytest.raises(ScoreError, match="needs calibration data"):
        ExpertClusters(coactivation=1.0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    with pytest.raises(NothingToPrune, match="no axis of the kind 'experts'.*it has 'units' and 'neurons' and 'all'$"):
        ExpertClusters()(depgraph.trace(plain, torch.randn(2, 5)))
    model = Stacked()
    graph = depgraph.trace(model, torch.randn(5, WIDTH))
    with pytest.raises(DataError, match="no batches"):
        ExpertClusters([], coactivation=1.0)(graph)
    with torch.no_grad():
        model.up[2, 1] = float("nan")
    with pytest.raises(ScoreError, match="'up' holds NaN"):
        ExpertClusters()(graph)
