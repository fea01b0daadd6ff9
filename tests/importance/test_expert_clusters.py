"""STUN: clusters of experts, who stands for them, and what becomes of their weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import DataError, NothingToPrune, ScoreError
from importance import ExpertClusters, averaged_experts, expert_clusters, mixtures, representatives
from importance.clustering import coactivation_distances, linkage, merged, row_distances
from tests.test_experts import EXPERTS, INNER, WIDTH, Dense, Scattered, Sorted, Stacked
from tests.zoo import ZOO

INF = np.inf
THREE = np.array([[INF, 1, 5], [1, INF, 5], [5, 5, INF]])


def test_two_near_experts_are_one_cluster() -> None:
    """METHODS.md 2.27: threshold 2 gives {0, 1}, {2}."""
    assert merged(THREE, threshold=2) == ((0, 1), (2,))
    assert merged(THREE, threshold=1) == ((0,), (1,), (2,))
    assert merged(THREE) == ((0, 1, 2),)
    assert merged(THREE, at_least=2) == ((0, 1), (2,))
    assert linkage(THREE) == [(0, 1, 1.0), (0, 2, 5.0)]


def test_clusters_join_only_if_both_ends_of_the_pair_are_near_to_all() -> None:
    """1 is near to 0 and to 2, but these two are far from each other."""
    chain = np.array([[INF, 1, 9], [1, INF, 2], [9, 2, INF]])
    assert merged(chain, threshold=3) == ((0, 1), (2,))
    assert merged(chain, threshold=10) == ((0, 1, 2),)


@pytest.mark.parametrize("seed", range(5))
def test_as_many_clusters_as_are_asked_for(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(9, 3))
    distances = row_distances(points)
    np.testing.assert_allclose(distances[2, 5], np.linalg.norm(points[2] - points[5]))
    for keep in range(1, 10):
        clusters = expert_clusters(distances, keep)
        assert len(clusters) == keep
        assert sorted(unit for cluster in clusters for unit in cluster) == list(range(9))
    with pytest.raises(ScoreError, match="from 1 to 9 experts"):
        expert_clusters(distances, 0)


def test_merges_below_a_threshold_leave_no_far_members() -> None:
    distances = row_distances(np.random.default_rng(0).normal(size=(12, 4)))
    heights = [apart for _, _, apart in linkage(distances)]
    assert heights == sorted(heights) and len(heights) == 11
    assert heights[-1] == pytest.approx(distances[np.isfinite(distances)].max())


def test_long_lists_of_experts_have_the_same_distances() -> None:
    rows = np.random.default_rng(0).normal(size=(80, 5))
    expected = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    found = row_distances(rows)
    apart = ~np.eye(80, dtype=bool)
    np.testing.assert_allclose(found[apart], expected[apart], atol=1e-7)
    np.testing.assert_allclose(row_distances(rows, relative=True)[apart], found[apart] / np.linalg.norm(rows))


def test_experts_that_are_chosen_together_are_near() -> None:
    counts = np.array([[0, 8, 2], [8, 0, 2], [2, 2, 0]])
    found = coactivation_distances(counts)
    assert found[0, 1] == pytest.approx(-2) and found[0, 2] == pytest.approx(-0.5)
    assert coactivation_distances(counts, relative=False)[0, 1] == -8
    assert merged(found, at_least=2) == ((0, 1), (2,))


@pytest.mark.parametrize("bad", [np.ones((2, 3)), np.array([[0, 1], [2, 0]]), np.array([[0, -1], [-1, 0]])])
def test_counts_that_cant_be_are_data_errors(bad: np.ndarray) -> None:
    with pytest.raises(DataError, match="co-activation counts must be"):
        coactivation_distances(bad)
    with pytest.raises(ScoreError, match="distances must be a symmetric matrix"):
        merged(np.array([[0, np.nan], [np.nan, 0]]))


def twins(kind: type[Stacked] = Stacked) -> Stacked:
    """Of six experts, 1 and 4 have the same row of the router, and 3 nearly that of 0."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        model.router.weight.copy_(nn.init.orthogonal_(torch.empty(EXPERTS, WIDTH)))
        model.router.weight[4] = model.router.weight[1]
        model.router.weight[3] = model.router.weight[0] + 0.05
    return model


@pytest.mark.parametrize("kind", [Stacked, Dense, Scattered, Sorted])
def test_experts_are_found_with_their_gate_in_any_form(kind: type[Stacked]) -> None:
    graph = depgraph.trace(twins(kind), torch.randn(9, WIDTH))
    (found,) = mixtures(graph)
    assert found.size == EXPERTS and (found.gate.parameter, found.gate.dim) == ("router.weight", 0)
    assert {place.parameter for place in found.weights} == {"up", "down", "bias", "router.bias"}
    scores = ExpertClusters()(graph)[found.axis]
    first, second = np.argsort(scores)[:2]
    assert first in (1, 4) and second in (0, 3) and scores[first] == pytest.approx(0, abs=1e-6)
    plan = graph.plan(ExpertClusters(), depgraph.Target(params=0.7), only=[found.axis])
    gone = set(plan.removal[found.axis])
    assert len(gone & {1, 4}) == 1 and plan.apply().up.shape[0] == EXPERTS - len(gone)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_of_transformers_are_found(name: str) -> None:
    example = ZOO[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    found = mixtures(graph)
    assert len(found) == 2 and all(m.size == 6 for m in found)
    scores = ExpertClusters()(graph)
    others = [scores[a.name] for a in graph.axes if a.name not in {m.axis for m in found}]
    assert max(scores[m.axis].max() for m in found) < min(float(s.min()) for s in others)


def test_coactivation_decides_where_it_is_given() -> None:
    graph = depgraph.trace(twins(), torch.randn(9, WIDTH))
    (found,) = mixtures(graph)
    counts = np.zeros((EXPERTS, EXPERTS))
    counts[2, 5] = counts[5, 2] = 30
    alone = ExpertClusters({found.axis: counts}, gate_weight=0)
    assert np.argmin(alone(graph)[found.axis]) in (2, 5)
    assert expert_clusters(alone.distances(graph, found), 5) == ((0,), (1,), (2, 5), (3,), (4,))
    both = ExpertClusters({found.axis: counts}).distances(graph, found)
    gates = ExpertClusters().distances(graph, found)
    np.testing.assert_allclose(both, coactivation_distances(counts) + gates)
    with pytest.raises(ScoreError, match="has 6 experts, but co-activation counts"):
        ExpertClusters({found.axis: np.ones((5, 5))})(graph)
    with pytest.raises(ScoreError, match="'router' is no axis of experts"):
        ExpertClusters({"router": counts})(graph)


def test_who_stays_is_the_member_nearest_to_the_mean() -> None:
    model = twins()
    graph = depgraph.trace(model, torch.randn(9, WIDTH))
    (found,) = mixtures(graph)
    clusters = ((0, 3, 5), (1, 4), (2,))
    experts = torch.cat([p.detach().flatten(1) for p in (model.up, model.down, model.bias)], dim=1)
    expected = []
    for cluster in clusters:
        apart = (experts[list(cluster)] - experts[list(cluster)].mean(dim=0)).norm(dim=1)
        expected.append(cluster[int(apart.argmin())])
    stays = representatives(graph, found, clusters)
    assert stays[0] == expected[0] and stays[1] in (1, 4) and stays[2] == 2


def test_a_cluster_may_be_averaged_instead() -> None:
    model = twins()
    graph = depgraph.trace(model, torch.randn(9, WIDTH))
    (found,) = mixtures(graph)
    clusters = ((0, 3), (1, 4), (2,), (5,))
    before = copy.deepcopy(model.state_dict())
    changed = averaged_experts(graph, found, clusters)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stays = representatives(graph, found, clusters)
    assert set(changed) == {"router.weight", "router.bias", "up", "down", "bias"}
    for name, tensor in changed.items():
        for expert, cluster in zip(stays, clusters, strict=True):
            torch.testing.assert_close(tensor[expert], before[name][list(cluster)].mean(dim=0))
        torch.testing.assert_close(tensor[[2, 5]], before[name][[2, 5]])
    assert changed["up"].shape == (EXPERTS, INNER, WIDTH)


def test_experts_that_are_the_same_lose_nothing_when_one_goes() -> None:
    """Two that are alike in all are one: with each chosen as often as before, the output stays."""
    torch.manual_seed(0)
    model = Stacked().eval()
    with torch.no_grad():
        for tensor in (model.up, model.down, model.bias, model.router.weight, model.router.bias):
            tensor[4] = tensor[1]
    graph = depgraph.trace(model, torch.randn(9, WIDTH))
    (found,) = mixtures(graph)
    order = np.argsort(ExpertClusters()(graph)[found.axis])
    assert order[0] in (1, 4)
    changed = averaged_experts(graph, found, [(1, 4)])
    torch.testing.assert_close(changed["up"], model.up.detach())


def test_scores_follow_the_experts_when_these_are_permuted() -> None:
    model, order = twins(), torch.randperm(EXPERTS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            if len(theirs) == EXPERTS:
                mine.copy_(theirs[order])
    found = [ExpertClusters()(depgraph.trace(m, torch.randn(9, WIDTH)))["up:0"] for m in (model, other)]
    np.testing.assert_allclose(found[1], found[0][order.numpy()], rtol=1e-5, atol=1e-6)


def test_models_without_experts_are_told_so() -> None:
    graph = depgraph.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
    with pytest.raises(NothingToPrune, match="no axis of stacked experts with a gate"):
        importance.named("stun")(graph)
