"""Bonsai: regression on sub-models, what sub-models lack, and that zoo models of any kind can be scored so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depgraph
from depgraph.errors import DataError, ScoreError
from depgraph.observing import Observer
from importance import Activation, Bonsai
from importance.perturbing import Candidates, masks, removal, side
from importance.regression import fitted, kendall, ridge
from tests.zoo import MODULES, ZOO


def zoo_graph(name: str) -> depgraph.DependencyGraph:
    example = {**ZOO, **MODULES}[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


@pytest.mark.parametrize(
    ("one", "other", "tau"),
    [([1, 2, 3], [4, 5, 9], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3], [1, 3, 2], 1 / 3), ([1, 2, 3], [1, 1, 1], 0)],
)
def test_kendall_by_hand(one: list[float], other: list[float], tau: float) -> None:
    assert kendall(np.array(one), np.array(other)) == pytest.approx(tau)


def test_ridge_without_a_penalty_is_least_squares_and_shrinks_with_one() -> None:
    generator = np.random.default_rng(0)
    inputs, truth = generator.normal(size=(30, 3)), np.array([1.0, -2.0, 3.0])
    outputs = inputs @ truth + 5
    coefficients, intercept = ridge(inputs, outputs, 1e-12)
    assert coefficients == pytest.approx(truth)
    assert intercept == pytest.approx(5)
    assert np.linalg.norm(ridge(inputs, outputs, 1.0)[0]) < np.linalg.norm(truth)


def test_an_additive_utility_gives_its_order_back() -> None:
    """METHODS.md 2.15: u(S) = sum of c_i over S recovers the order of c, with noise too."""
    generator = np.random.default_rng(1)
    worth = generator.permutation(np.arange(12.0))
    stays = generator.random((150, 12)) < 0.5
    folds = np.arange(150) % 5
    assert np.argsort(fitted(stays.astype(float), stays @ worth, folds)).tolist() == np.argsort(worth).tolist()
    noisy = stays @ worth + generator.normal(size=150)
    assert np.argsort(fitted(stays.astype(float), noisy, folds)).tolist() == np.argsort(worth).tolist()


def test_a_sub_model_and_its_complement_lack_each_candidate_once() -> None:
    graph = zoo_graph("llama_8_4")
    prior = Activation([(graph.args, graph.kwargs)[1] or graph.args], "bonsai")(graph)
    free = [axis.name for axis in graph.axes if axis.prunable.sum() > 8 and axis.exact]
    pool = [Candidates.of(graph, name, prior[name], 0.1) for name in free]
    stays = masks(pool, 6, np.random.default_rng(0))
    np.testing.assert_array_equal(stays[::2] + stays[1::2].astype(int), 1)
    for one in pool:
        size = graph[one.axis].size
        assert one.going == int(0.1 * size) + 1
        assert prior[one.axis][one.groups].max() <= np.partition(prior[one.axis], 2 * one.going - 1)[2 * one.going - 1]
    many = [removal(pool, row) for row in masks(pool, 200, np.random.default_rng(0))]
    for one in pool:
        numbers = [len(gone[one.axis]) for gone in many]
        assert np.mean(numbers) == pytest.approx(one.going), "with complements, half of the candidates on average"
        assert set(numbers) == set(range(2 * one.going + 1))


class Sum(nn.Module):
    """Ten neurons, each of which adds its own number to one output."""

    def __init__(self, worth: list[float]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, len(worth)), nn.Linear(len(worth), 1, bias=False)
        with torch.no_grad():
            self.up.weight.zero_()
            self.up.bias.fill_(1)
            self.down.weight.copy_(torch.tensor([worth]))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


WORTH = [0.5, -3.0, 2.0, 1.0, -1.0, 4.0, 0.1, 5.0, -0.2, 3.0]


def adding(**options: Any) -> tuple[depgraph.DependencyGraph, Bonsai]:
    x = torch.zeros(2, 4)
    graph = depgraph.trace(Sum(WORTH), x)
    loss = options.pop("loss", lambda output, batch: -output.mean())
    return graph, Bonsai([x], loss, **{"share": 0.45, "masks": 40, "utility": "loss", **options})


def test_neurons_that_harm_go_first_however_large_they_are() -> None:
    graph, scorer = adding()
    (name,) = (axis.name for axis in graph.axes if axis.size == 10)
    found = scorer(graph)[name]
    assert np.argsort(found).tolist() == np.argsort(WORTH).tolist()
    plan = graph.plan(scorer, depgraph.Target(params=0.75))
    assert set(plan.removal[name]) == {1, 4, 8}


class Sums(nn.Module):
    """Two such sums, of which every neuron of the first is worth more than any of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Sum([12.0, 11, 19, 15, 14, 17, 16, 13]), Sum([1.0, 3, 2, 4, 8, 6, 5, 7])

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def test_candidates_of_different_axes_compare() -> None:
    """If as many of an axis always went, coefficients would tell what each is worth beside the others of its axis only."""
    x = torch.zeros(2, 4)
    graph = depgraph.trace(Sums(), x)
    found = Bonsai([x], lambda output, batch: -output.mean(), masks=60, share=0.25, utility="loss")(graph)
    dear, cheap = found["first.up.weight:0"], found["second.up.weight:0"]
    candidates = np.argsort(dear)[:6], np.argsort(cheap)[:6]
    assert dear[candidates[0]].min() > cheap[candidates[1]].max()
    assert dear[candidates[0]] == pytest.approx([11, 12, 13, 14, 15, 16], rel=0.05)


def test_groups_that_are_no_candidates_rank_above_by_the_prior() -> None:
    graph, scorer = adding(share=0.1)
    (name,) = (axis.name for axis in graph.axes if axis.size == 10)
    found, prior = scorer(graph)[name], np.abs(WORTH)
    candidates = np.argsort(prior, kind="stable")[:4]
    others = np.setdiff1d(np.arange(10), candidates)
    assert found[candidates].max() < found[others].min()
    assert np.argsort(found[others]).tolist() == np.argsort(prior[others], kind="stable").tolist()


def test_without_sub_models_the_prior_is_wanda_with_means() -> None:
    """METHODS.md 2.15: of a head, the mean of what Wanda-sp sums."""
    graph = zoo_graph("llama_8_8")
    batch = graph.kwargs or graph.args
    prior, sums = Bonsai([batch], masks=0)(graph), Activation([batch], "wanda-sp")(graph)
    for axis in graph.axes:
        order = np.argsort(sums[axis.name], kind="stable")
        if axis.prunable.all() and axis.name.endswith("o_proj.weight:1"):
            width = 4 if axis.size == 8 else 1
            assert prior[axis.name] * width == pytest.approx(sums[axis.name])
        assert np.argsort(prior[axis.name], kind="stable").tolist() == order.tolist()
    assert not Bonsai([batch], masks=0).comparable


def test_the_same_seed_gives_the_same_scores() -> None:
    graph, scorer = adding(masks=5)
    again, other = adding(masks=5)[1](graph), adding(masks=5, seed=1)[1](graph)
    once = scorer(graph)
    assert all((once[name] == again[name]).all() for name in once)
    assert any((once[name] != other[name]).any() for name in once)


WHOLE = ("lstm_both_ways", "group_norm_cnn")


@pytest.mark.parametrize("name", ["llama_8_2", "mixtral", "vit", "group_norm_cnn", "lstm_both_ways"])
def test_any_model_can_be_scored(name: str) -> None:
    """A sub-model without a group is the model without it, and scores are finite."""
    graph = zoo_graph(name)
    batch = graph.kwargs or graph.args

    def size(output: Any, batch: Any) -> Tensor:
        return pytree.tree_leaves(output)[0].float().square().mean()

    scores = Bonsai([batch], size, masks=3, units="all" if name in WHOLE else "units")(graph)
    assert all(np.isfinite(array).all() for array in scores.values())
    axis = next(a for a in graph.axes if a.prunable.sum() > 1 and a.exact)
    gone = {axis.name: np.flatnonzero(axis.prunable)[:1]}
    pruned = graph.cut_plan({n: g.tolist() for n, g in gone.items()}).apply()
    with torch.no_grad():
        wanted = size(pruned(*graph.args, **graph.kwargs), None)
    found = size(Observer(graph).call((graph.args, graph.kwargs), side(graph, gone)), None)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_a_language_model_needs_no_loss_of_its_own() -> None:
    graph = zoo_graph("llama_8_8")
    scores = Bonsai([graph.kwargs or graph.args], masks=3)(graph)
    assert scores.keys() == {axis.name for axis in graph.axes}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ScoreError, match="share=0"):
        Bonsai([1], share=0)
    with pytest.raises(ScoreError, match="unknown utility 'perplexty': did you mean 'perplexity'"):
        Bonsai([1], utility="perplexty")
    graph, scorer = adding(loss=lambda output, batch: output.mean() * float("nan"))
    with pytest.raises(ScoreError, match="the loss of the whole model is nan"):
        scorer(graph)
    with pytest.raises(DataError, match="no batches"):
        Bonsai([])(graph)
    with pytest.raises(ScoreError, match="returned no loss"):
        adding(loss=None)[1](graph)


class _Routed(nn.Module):
    """Rows with a positive number go through one map more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.more, self.last = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.relu(self.first(x))
        at = torch.where(x[:, 0] > 0)[0]
        return self.last(made.index_add(0, at, self.more(made[at]))), made.mean()


def test_sub_models_of_code_that_depends_on_values_are_run_too() -> None:
    torch.manual_seed(0)
    model, x = _Routed().eval(), torch.randn(10, 4)
    graph = depgraph.trace(model, x)
    scores = Bonsai([x, x.flip(0)], lambda output, batch: output[0].square().mean(), masks=4, units="all")(graph)
    assert scores and all(np.isfinite(found).all() for found in scores.values())
