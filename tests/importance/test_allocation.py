"""How a budget is spread: published examples and invariants, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import PlanError, ScoreError, TargetError
from importance import allocations
from importance.allocations import adapt, cfsp, lamp, owl
from tests.zoo import ZOO

Graph = depgraph.DependencyGraph
Scores = dict[str, np.ndarray]
NAMES = [name for name in allocations.names() if not allocations.needs(name)]
BLOCKS = ["layers.0", "layers.1", "layers.2"]


class Block(nn.Module):
    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, neurons), nn.Linear(neurons, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Residual blocks and a head; each neuron of a block costs 9 parameters, each of the head 7."""

    def __init__(self, *neurons: int, hidden: int = 20) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(n) for n in neurons)
        self.head = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class TwoCosts(nn.Module):
    """Two groups that cost 3 parameters each and four that cost 1."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.neurons = nn.Linear(1, 4, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(torch.tanh(self.heads(x))), torch.relu(self.neurons(x)).sum(-1)


def traced(model: nn.Module, width: int = 4) -> Graph:
    return depgraph.trace(model.eval(), torch.randn(3, width))


@pytest.fixture(scope="module")
def stack() -> Graph:
    torch.manual_seed(0)
    return traced(Stack(100, 100, 100))


@pytest.fixture(scope="module", params=["llama_8_4", "resnet_basic"])
def zoo_graph(request: pytest.FixtureRequest) -> Graph:
    example = ZOO[request.param]()
    return depgraph.trace(example.model, example.args, example.kwargs)


def random_scores(graph: Graph, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return {axis.name: rng.gamma(2.0, size=axis.size) for axis in graph.axes}


def neuron(block: str) -> str:
    return f"{block}.up.weight:0"


def removed(graph: Graph, allocation: Any, groups: int, scores: Scores | None = None) -> list[int]:
    """How many neurons of each block go where `groups` neurons of blocks go in all, none of the head's."""
    target = depgraph.Target(params=1 - 9 * groups / graph.dense_cost.params + 1e-9)
    scorer = importance.Allocated(scores or random_scores(graph), allocation)
    plan = graph.plan(scorer, target, protect="head*")
    return [len(plan.removal.get(neuron(block), ())) for block in BLOCKS]


def allocated(graph: Graph, allocation: Any, scores: Scores) -> Scores:
    return importance.Allocated(scores, allocation)(graph)


def same(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> bool:
    return all(np.allclose(one[name], two[name], rtol=1e-9, atol=1e-12) for name in one)


# Every allocation


@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_met_within_one_group_on_any_architecture(zoo_graph: Graph, name: str) -> None:
    scorer = importance.Allocated(importance.Magnitude(), allocations.named(name))
    plan = zoo_graph.plan(scorer, depgraph.Target(params=0.6))
    share = plan.cost().params / zoo_graph.dense_cost.params
    costs = {
        axis.name: zoo_graph.dense_cost.params - zoo_graph.cost({axis.name: [0]}).params for axis in zoo_graph.axes
    }
    assert 0.6 - max(costs.values()) / zoo_graph.dense_cost.params < share <= 0.6


@pytest.mark.parametrize("name", NAMES)
def test_the_order_within_an_axis_stays(zoo_graph: Graph, name: str) -> None:
    scores = random_scores(zoo_graph)
    found = allocated(zoo_graph, allocations.named(name), scores)
    assert found.keys() == scores.keys()
    for axis, given in scores.items():
        assert (np.diff(found[axis][np.argsort(given)]) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_permuted_groups_have_permuted_scores(stack: Graph, name: str) -> None:
    scores, rng = random_scores(stack), np.random.default_rng(1)
    orders = {axis: rng.permutation(len(given)) for axis, given in scores.items()}
    found = allocated(stack, allocations.named(name), scores)
    again = allocated(stack, allocations.named(name), {a: given[orders[a]] for a, given in scores.items()})
    assert same(again, {a: given[orders[a]] for a, given in found.items()})


@pytest.mark.parametrize("name", ["uniform", "kind-uniform", "owl", "al-am", "al-mm", "ul-um", "ul-mm", "lamp", "sap"])
def test_the_scale_of_all_scores_changes_nothing(stack: Graph, name: str) -> None:
    scores = random_scores(stack)
    one, two = (
        allocated(stack, allocations.named(name), {a: s * by for a, s in scores.items()}) for by in (1.0, 1000.0)
    )
    assert same(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_groups_that_can_not_go_may_score_anything(name: str) -> None:
    example = ZOO["bloom"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    assert any(axis.reasons for axis in graph.axes)
    low, high = random_scores(graph), random_scores(graph)
    for axis in graph.axes:
        low[axis.name][~axis.prunable] = 0.0
        high[axis.name][~axis.prunable] = np.nan
    target = depgraph.Target(params=0.9)
    one, two = (graph.plan(importance.Allocated(s, allocations.named(name)), target) for s in (low, high))
    assert one.removal == two.removal


def test_an_allocated_scorer_is_checked() -> None:
    with pytest.raises(ScoreError, match="'uniform' is no allocation: pass one such as"):
        importance.Allocated(importance.Magnitude(), "uniform")  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="is no allocation"):
        importance.Allocated(importance.Magnitude(), allocations.Uniform)  # type: ignore[arg-type]


def test_scores_are_checked_before_they_are_spread(stack: Graph) -> None:
    scores = random_scores(stack)
    scores[neuron("layers.1")][7] = np.nan
    with pytest.raises(ScoreError, match="group 7 of axis 'layers.1.up.weight:0' is nan"):
        stack.plan(importance.Allocated(scores, allocations.Uniform()), depgraph.Target(params=0.5))


# Uniform, global, by kind, by cost


def test_uniform_takes_the_same_share_of_every_axis(zoo_graph: Graph) -> None:
    target = depgraph.Target(params=0.6)
    plan = zoo_graph.plan(importance.Allocated(importance.Magnitude(), allocations.Uniform()), target)
    assert plan.removal == zoo_graph.plan(importance.Magnitude(), target, scope="axis").removal


def test_global_ranks_the_scores_as_they_are(stack: Graph) -> None:
    scores, target = random_scores(stack), depgraph.Target(params=0.6)
    for name in ("global", "surgeon"):
        plan = stack.plan(importance.Allocated(scores, allocations.named(name)), target)
        assert plan.removal == stack.plan(scores, target, scope="global").removal


def test_one_threshold_counts_what_rows_and_columns_have_in_common_once() -> None:
    """LLM Surgeon, METHODS.md 2.14: a rows and b columns of a layer with C columns and R rows hold aC + bR - ab weights."""
    model = nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in ((1, 30), (30, 20), (20, 1))))
    graph = traced(model, 1)
    columns, rows = (axis.name for axis in graph.axes)
    scores = {columns: np.linspace(1, 2, 30), rows: np.linspace(1.01, 2.01, 20)}
    plan = graph.plan(importance.Allocated(scores, allocations.named("surgeon")), depgraph.Target(params=0.5))
    a, b = len(plan.removal[rows]), len(plan.removal[columns])
    assert graph.dense_cost.params - plan.cost().params == (a * 30 + b * 20 - a * b) + a + b
    gone = max(scores[columns][b - 1], scores[rows][a - 1])
    assert min(scores[columns][b], scores[rows][a]) > gone


def test_by_cost_is_density() -> None:
    graph, target = traced(TwoCosts(), 1), depgraph.Target(params=0.5)
    assert allocations.group_costs(graph) == {"heads.weight:0": 3.0, "neurons.weight:0": 1.0}
    scores = {"heads.weight:0": np.array([2.0, 2.5]), "neurons.weight:0": np.array([1.0, 0.7, 0.9, 3.0])}
    plan = graph.plan(importance.Allocated(scores, allocations.ByCost()), target)
    assert plan.removal == {"heads.weight:0": (0,), "neurons.weight:0": (1, 2)}
    assert plan.removal == graph.plan(scores, target, rank="density").removal
    dearer = depgraph.Target(params=0.7)
    assert graph.plan(scores, dearer, rank="density").removal == {"heads.weight:0": (0,)}
    assert graph.plan(scores, dearer).removal == {"neurons.weight:0": (0, 1, 2)}


def test_kinds_lose_the_same_share_and_within_a_kind_the_lowest_go() -> None:
    graph = traced(Stack(40, 20, hidden=30))
    scores = {axis.name: np.arange(axis.size) + 1000.0 * k for k, axis in enumerate(graph.axes)}
    gone = (30 * 9 + 15 * 7) / graph.dense_cost.params
    for within, counts in ((allocations.Global(), [30, 0, 15]), (allocations.Uniform(), [20, 10, 15])):
        scorer = importance.Allocated(scores, allocations.PerKind(within))
        plan = graph.plan(scorer, depgraph.Target(params=1 - gone + 1e-9))
        assert [len(plan.removal.get(axis.name, ())) for axis in graph.axes] == counts


def test_a_kind_may_go_slower() -> None:
    graph = traced(Stack(40, 20, hidden=30))
    scores = random_scores(graph)
    gone = (30 * 9 + 7.5 * 7) / graph.dense_cost.params
    slow = graph.plan(
        importance.Allocated(scores, allocations.PerKind(pace={"head*": 0.5})), depgraph.Target(params=1 - gone)
    )
    assert len(slow.removal["head.0.weight:0"]) in (7, 8)
    never = graph.plan(
        importance.Allocated(scores, allocations.PerKind(pace={"head*": 0})), depgraph.Target(params=0.5)
    )
    assert "head.0.weight:0" not in never.removal


def test_paces_are_checked(stack: Graph) -> None:
    for pace in (-1, np.nan, "fast", True):
        with pytest.raises(ScoreError, match="the pace of 'head"):
            allocations.PerKind(pace={"head*": pace})  # type: ignore[dict-item]
    with pytest.raises(ScoreError, match="'tail' , which names no axis|'tail', which names no axis"):
        allocated(stack, allocations.PerKind(pace={"tail": 1}), random_scores(stack))
    with pytest.raises(ScoreError, match="have different paces"):
        allocated(stack, allocations.PerKind(pace={"layers.1.*": 0.5}), random_scores(stack))


# FLAP's structures


def test_flap_standardises_each_axis(zoo_graph: Graph) -> None:
    for scores in allocated(zoo_graph, allocations.Standardised(), random_scores(zoo_graph)).values():
        assert scores.mean() == pytest.approx(0, abs=1e-12)
        assert scores.std(ddof=1) == pytest.approx(1)


def test_flap_pools_heads_and_neurons_by_exact_cost() -> None:
    """METHODS.md 2.2: heads [.5, -.5] at a cost of 3, neurons [1, -1, .2, -.2] at 1, half to stay: kept cost 5."""
    graph = traced(TwoCosts(), 1)
    scores = {"heads.weight:0": np.array([0.5, -0.5]), "neurons.weight:0": np.array([1, -1, 0.2, -0.2])}
    plan = graph.plan(importance.Allocated(scores, allocations.Global()), depgraph.Target(params=0.5))
    assert graph.dense_cost.params == 10
    assert plan.removal == {"heads.weight:0": (1,), "neurons.weight:0": (1, 3)}
    assert plan.cost().params == 5


@pytest.mark.parametrize("structure", ["AL-AM", "AL-MM"])
def test_a_shift_of_all_scores_of_an_axis_changes_nothing(stack: Graph, structure: str) -> None:
    scores = random_scores(stack)
    shifted = {name: given + 10.0 * k for k, (name, given) in enumerate(scores.items())}
    one, two = (allocated(stack, allocations.Standardised(structure), s) for s in (scores, shifted))
    assert same(one, two)


def test_flap_structures_differ_in_what_is_equal() -> None:
    graph = traced(Stack(80, 40, hidden=30))
    first, second, head = (axis.name for axis in graph.axes)
    scores = {first: np.arange(80) ** 4.0, second: np.arange(40) ** 0.25, head: np.arange(30.0)}

    def counts(structure: str) -> dict[str, int]:
        gone = (60 * 9 + 15 * 7) / graph.dense_cost.params
        scorer = importance.Allocated(scores, allocations.Standardised(structure))
        plan = graph.plan(scorer, depgraph.Target(params=1 - gone + 1e-9))
        return {name: len(plan.removal.get(name, ())) for name in (first, second, head)}

    assert counts("UL-UM") == {first: 40, second: 20, head: 15}
    assert counts("UL-MM") == {first: 30, second: 30, head: 15}
    pooled = counts("AL-MM")
    assert (pooled[first] + pooled[second], pooled[head]) == (60, 15)
    assert pooled[first] != 40
    assert counts("AL-AM") != pooled


# LAMP


def test_lamp_of_the_published_example() -> None:
    assert lamp.lamp(np.array([1.0, 4.0, 9.0])) == pytest.approx([1 / 14, 4 / 13, 1.0])
    graph = traced(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    found = allocated(graph, allocations.Lamp(), {graph.axes[0].name: np.array([9.0, 1.0, 4.0])})
    assert found[graph.axes[0].name] == pytest.approx([1.0, 0.071429, 0.307692], abs=1e-6)


def test_lamp_gives_every_axis_the_same_highest_score(zoo_graph: Graph) -> None:
    scores = {name: given * 10.0**k for k, (name, given) in enumerate(random_scores(zoo_graph).items())}
    assert {given.max() for given in allocated(zoo_graph, allocations.Lamp(), scores).values()} == {1.0}


def test_lamp_of_dead_groups_is_finite(stack: Graph) -> None:
    scores = {name: np.zeros_like(given) for name, given in random_scores(stack).items()}
    for given in allocated(stack, allocations.Lamp(), scores).values():
        assert sorted(given) == [0.0] * (len(given) - 1) + [1.0]


@pytest.mark.parametrize("allocation", [allocations.Lamp(), allocations.Sap()])
def test_what_needs_sizes_refuses_negative_scores(stack: Graph, allocation: Any) -> None:
    scores = random_scores(stack)
    scores[neuron("layers.2")][3] = -1
    with pytest.raises(ScoreError, match="needs scores of at least zero, axis 'layers.2.up.weight:0' has -1"):
        allocated(stack, allocation, scores)


# OWL


def test_owl_of_the_published_example(stack: Graph) -> None:
    ratios = dict(zip(BLOCKS, [1.0, 3.0, 5.0], strict=True))
    keep = [0.5 + lead for lead in owl.leads(ratios, 0.08).values()]
    assert keep == pytest.approx([0.42, 0.50, 0.58])
    assert removed(stack, allocations.Owl(ratios), 150) == [58, 50, 42]


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
def test_owl_keeps_the_mean_and_spreads_as_told(spread: float) -> None:
    ratios = dict(zip("abcd", [2.0, 0.5, 7.0, 3.0], strict=True))
    lead = owl.leads(ratios, spread)
    assert np.mean(list(lead.values())) == pytest.approx(0, abs=1e-12)
    assert max(lead.values()) - min(lead.values()) == pytest.approx(2 * spread)
    assert owl.leads({name: 3 * ratio + 5 for name, ratio in ratios.items()}, spread) == pytest.approx(lead)


def test_owl_with_equal_ratios_is_uniform(stack: Graph) -> None:
    scores = random_scores(stack)
    found = allocated(stack, allocations.Owl(dict.fromkeys(BLOCKS, 2.5)), scores)
    assert same(found, allocated(stack, allocations.Uniform(), scores))


def test_owl_without_ratios_looks_for_outliers_among_the_weights() -> None:
    model = Stack(100, 100, 100)
    with torch.no_grad():
        for layer in model.layers:
            layer.up.weight.fill_(0.1)  # type: ignore[union-attr, operator]
            layer.down.weight.fill_(-0.1)  # type: ignore[union-attr, operator]
        model.layers[1].up.weight[:4] = 5.0  # type: ignore[union-attr, index]
    graph = traced(model)
    assert allocations.weight_outliers(graph) == {"layers.0": 0.0, "layers.1": 2.0, "layers.2": 0.0}
    assert removed(graph, allocations.Owl(), 149) == [55, 39, 55]
    assert removed(graph, allocations.Owl(times=50.0), 150) == [50, 50, 50]


def test_owl_without_blocks_is_uniform() -> None:
    graph = traced(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)))
    scores = random_scores(graph)
    assert same(allocated(graph, allocations.Owl(), scores), allocated(graph, allocations.Uniform(), scores))


def test_the_outlier_ratio_is_a_percentage() -> None:
    assert allocations.outlier_ratio(np.array([0.0] * 19 + [1.0])) == 5.0
    assert allocations.outlier_ratio(np.ones((4, 5))) == 0.0
    assert allocations.outlier_ratio(np.array([])) == 0.0


@pytest.mark.parametrize("given", [{"spread": -0.1}, {"spread": 0.6}, {"times": 0}])
def test_owl_is_checked(given: dict[str, float]) -> None:
    with pytest.raises(ScoreError, match="OWL"):
        allocations.Owl(**given)  # type: ignore[arg-type]


# CFSP


def test_cfsp_keeps_the_average_share() -> None:
    importances = {"a": 0.05, "b": 0.1, "c": 0.3, "d": 0.12}
    for slope in (0.0, 1.0, cfsp.PUBLISHED_SLOPE, 200.0):
        found = cfsp.weights(importances, slope)
        heaviest = max(found.values())
        assert np.mean(list(found.values())) == pytest.approx(1)
        for sparsity in (0.01, 0.2, 0.5, 0.9):
            kept = [cfsp.kept_share(weight, heaviest, sparsity) for weight in found.values()]
            assert np.mean(kept) == pytest.approx(1 - sparsity)
            assert max(kept) <= 1 + 1e-12
    assert cfsp.weights({name: value + 3 for name, value in importances.items()}, 5.0) == pytest.approx(
        cfsp.weights(importances, 5.0)
    )


@pytest.mark.parametrize("groups", [60, 150, 240])
def test_cfsp_is_what_a_plan_takes(stack: Graph, groups: int) -> None:
    importances = dict(zip(BLOCKS, [0.05, 0.1, 0.15], strict=True))
    found = cfsp.weights(importances, cfsp.PUBLISHED_SLOPE)
    wanted = [100 - 100 * cfsp.kept_share(w, max(found.values()), groups / 300) for w in found.values()]
    assert removed(stack, allocations.Cfsp(importances), groups) == pytest.approx(wanted, abs=1)
    assert wanted[0] > wanted[1] > wanted[2]


def test_cfsp_with_equal_importances_is_uniform(stack: Graph) -> None:
    scores = random_scores(stack)
    found = allocated(stack, allocations.Cfsp(dict.fromkeys(BLOCKS, 0.2)), scores)
    assert same(found, allocated(stack, allocations.Uniform(), scores))
    with pytest.raises(ScoreError, match="slope of CFSP"):
        allocations.Cfsp({}, slope=-1)


# Adapt-Pruner


def test_adapt_pruner_of_the_published_example(stack: Graph) -> None:
    importances = dict(zip(BLOCKS, [-0.9, -0.8, -0.7], strict=True))
    found = adapt.stepped(dict.fromkeys(BLOCKS, 0.0), importances, step=0.05, amplitude=0.02)
    assert list(found.values()) == pytest.approx([0.07, 0.05, 0.03])
    assert removed(stack, allocations.AdaptPruner(importances, 0.05, 0.02), 15) == [7, 5, 3]


def test_adapt_pruner_loses_the_step_on_average_and_knows_no_scale() -> None:
    importances = {"a": -0.95, "b": -0.2, "c": -0.7, "d": -0.3}
    before = {"a": 0.2, "b": 0.1, "c": 0.3, "d": 0.2}
    after = adapt.stepped(before, importances, 0.05, 0.03)
    assert np.mean([after[name] - before[name] for name in before]) == pytest.approx(0.05)
    rescaled = {name: 4 * value - 1 for name, value in importances.items()}
    assert adapt.stepped(before, rescaled, 0.05, 0.03) == pytest.approx(after)
    even = adapt.stepped(before, importances, 0.05, 0.0)
    assert even == pytest.approx({name: value + 0.05 for name, value in before.items()})
    assert max(adapt.stepped(dict.fromkeys(before, 0.98), importances, 0.05, 0.03).values()) == 0.99


def test_adapt_pruner_without_differences_is_uniform(stack: Graph) -> None:
    scores = random_scores(stack)
    uniform = stack.plan(importance.Allocated(scores, allocations.Uniform()), depgraph.Target(params=0.6))
    for made in (
        allocations.AdaptPruner(dict.fromkeys(BLOCKS, -0.5)),
        allocations.AdaptPruner(dict(zip(BLOCKS, [1, 2, 3], strict=True)), amplitude=0.0),
    ):
        assert stack.plan(importance.Allocated(scores, made), depgraph.Target(params=0.6)).removal == uniform.removal


def test_adapt_pruner_takes_shares_of_the_first_widths(stack: Graph) -> None:
    """What later steps of a schedule take is in proportion to the widths before the first."""
    importances = dict(zip(BLOCKS, [-0.9, -0.8, -0.7], strict=True))
    scorer = importance.Allocated(importance.Magnitude(), allocations.AdaptPruner(importances, 0.05, 0.04))
    target = depgraph.Target(params=1 - 9 * 150 / stack.dense_cost.params + 1e-9)
    done = importance.Schedule(3, "linear").apply(stack, scorer, target, protect="head*")
    widths = [layer.up.out_features for layer in done.model.layers]  # type: ignore[union-attr]
    assert widths == pytest.approx([10, 50, 90], abs=1)
    assert sum(widths) == 150


def test_a_block_that_loses_nothing_is_taken_when_all_others_are_through(stack: Graph) -> None:
    importances = dict(zip(BLOCKS, [-0.9, -0.8, -0.7], strict=True))
    allocation = allocations.AdaptPruner(importances, step=0.05, amplitude=0.06)
    assert removed(stack, allocation, 100)[2] == 0
    assert removed(stack, allocation, 250)[2] > 0
    with pytest.raises(ScoreError, match="Adapt-Pruner has step=0"):
        allocations.AdaptPruner(importances, step=0)


# SAP


@pytest.mark.parametrize(
    ("values", "index", "needed", "goes"),
    [([1, 0, 0, 0], 0.75, 1, 3), ([1, 1, 1, 1], 0.0, 4, 0), ([3, 1, 0, 0], 0.533494, 2, 2)],
)
def test_the_pq_index_of_published_examples(values: list[float], index: float, needed: int, goes: int) -> None:
    given = np.array(values, dtype=float)
    assert allocations.pq_index(given) == pytest.approx(index, abs=1e-6)
    assert allocations.Sap().needed(given) == needed
    assert allocations.Sap().may_go(given) == goes


def test_the_pq_index_knows_no_scale_order_or_number_of_copies() -> None:
    given = np.random.default_rng(0).gamma(1.0, size=30)
    index = allocations.pq_index(given, 0.7, 1.5)
    for other in (given * 1e-200, given[::-1], np.concatenate([given, given])):
        assert allocations.pq_index(other, 0.7, 1.5) == pytest.approx(index)
    assert 0 <= index <= 1 - 30 ** (1 / 1.5 - 1 / 0.7)
    assert allocations.pq_index(np.zeros(5)) == 0.0
    assert allocations.pq_index(np.eye(30)[0], 0.7, 1.5) == pytest.approx(1 - 30 ** (1 / 1.5 - 1 / 0.7))


def test_sap_takes_from_axes_in_proportion_to_what_is_not_needed(stack: Graph) -> None:
    scores = {name: np.ones(len(given)) for name, given in random_scores(stack).items()}
    scores[neuron("layers.0")][40:] = 0
    scores[neuron("layers.2")][70:] = 0
    assert [allocations.Sap().may_go(scores[neuron(block)]) for block in BLOCKS] == [60, 0, 30]
    assert removed(stack, allocations.Sap(), 45, scores) == [30, 0, 15]
    assert allocations.Sap(beta=0.5).may_go(scores[neuron("layers.0")]) == 50
    assert allocations.Sap(gamma=0.5).may_go(scores[neuron("layers.0")]) == 30
    assert allocations.Sap(eta=0.5).needed(scores[neuron("layers.0")]) == 18
    with pytest.raises(ScoreError, match="SAP takes 0 < p < q"):
        allocations.Sap(p=2)


# GlobalMP


def test_floors_leave_every_axis_a_part_of_the_model(stack: Graph) -> None:
    scores = {axis.name: np.arange(axis.size) + 1000.0 * k for k, axis in enumerate(stack.axes)}
    floors = allocations.least_shares(stack, 0.05)
    wanted = 0.05 * stack.dense_cost.params
    least = {
        name: min(np.ceil(wanted / cost), stack[name].size) for name, cost in allocations.group_costs(stack).items()
    }
    plan = stack.plan(scores, depgraph.Target(params=0.3), floor=floors)
    left = {axis.name: axis.size - len(plan.removal.get(axis.name, ())) for axis in stack.axes}
    assert all(left[name] >= groups for name, groups in least.items())
    assert left[neuron("layers.0")] == least[neuron("layers.0")]
    assert least["head.0.weight:0"] == left["head.0.weight:0"] == stack["head.0.weight:0"].size
    assert plan.cost().params <= 0.3 * stack.dense_cost.params < plan.cost().params + 9


def test_floors_that_do_not_allow_the_target_are_refused(stack: Graph) -> None:
    with pytest.raises(TargetError, match="floors, protections and ties allow params=0.6"):
        stack.plan(random_scores(stack), depgraph.Target(params=0.3), floor=allocations.least_shares(stack, 0.2))
    with pytest.raises(ScoreError, match="the least part of the model"):
        allocations.least_shares(stack, 1.0)


def test_floors_are_given_by_pattern(stack: Graph) -> None:
    floors = {"layers.*": 0.5, neuron("layers.1"): 0.9}
    with pytest.raises(TargetError) as refused:
        stack.plan(random_scores(stack), depgraph.Target(params=0.01), floor=floors)
    least = stack.dense_cost.params - 9 * (50 + 10 + 50) - 7 * 19
    assert f"params={least / stack.dense_cost.params:.3f}" in str(refused.value)
    with pytest.raises(PlanError, match="floor='none' names no axis"):
        stack.plan(random_scores(stack), depgraph.Target(params=0.5), floor={"none": 0.5})
    with pytest.raises(PlanError, match=r"floor=1.5 of 'layers\.\*' must be a share"):
        stack.plan(random_scores(stack), depgraph.Target(params=0.5), floor={"layers.*": 1.5})


# Blocks


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("llama_8_4", ["model.layers.0", "model.layers.1"]),
        ("resnet_basic", [f"resnet.encoder.stages.{s}.layers.{k}" for s in (0, 1) for k in (0, 1)]),
        ("swin", [f"swin.encoder.layers.{s}.blocks.{k}" for s in (0, 1) for k in (0, 1)]),
        ("t5", [f"{part}.block.{k}" for part in ("encoder", "decoder") for k in (0, 1)]),
        ("mixtral", ["model.layers.0", "model.layers.1"]),
    ],
)
def test_blocks_are_found_in_the_order_of_execution(name: str, blocks: list[str]) -> None:
    example = ZOO[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    assert allocations.blocks(graph) == blocks
    for axis, block in allocations.axis_blocks(graph).items():
        assert all(m.target.startswith(f"{block}.") for m in graph[axis].members if m.kind == "parameter")


def test_a_stack_without_additions_has_the_repeated_modules_as_blocks() -> None:
    layer = lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))  # noqa: E731
    assert allocations.blocks(traced(nn.Sequential(layer(), layer()))) == ["0", "1"]
    assert allocations.blocks(traced(layer())) == []


def test_first_and_last_blocks_are_protected(stack: Graph) -> None:
    kept = allocations.first_and_last(stack)
    assert kept == (neuron("layers.0"), neuron("layers.2"))
    assert allocations.first_and_last(stack, 2, 0) == (neuron("layers.0"), neuron("layers.1"))
    plan = stack.plan(random_scores(stack), depgraph.Target(params=0.7), protect=kept)
    assert set(plan.removal) == {neuron("layers.1"), "head.0.weight:0"}


@pytest.mark.parametrize(("first", "last", "says"), [(2, 1, "leaves none to prune"), (-1, 0, "0 or more")])
def test_protecting_all_blocks_is_refused(stack: Graph, first: int, last: int, says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        allocations.first_and_last(stack, first, last)


def test_numbers_may_be_given_by_axis_or_by_a_function(stack: Graph) -> None:
    by_block = dict(zip(BLOCKS, [1.0, 3.0, 5.0], strict=True))
    by_axis = {neuron(block): ratio for block, ratio in by_block.items()}
    scores = random_scores(stack)
    wanted = allocated(stack, allocations.Owl(by_block), scores)
    for given in (by_axis, lambda graph: by_block, {**by_block, neuron("layers.0"): 1.0}):
        assert same(allocated(stack, allocations.Owl(given), scores), wanted)


@pytest.mark.parametrize("make", [allocations.Owl, allocations.Cfsp, allocations.AdaptPruner])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"layers.0": 1, "layers.1": 2, "layer.2": 3},
            "name 'layer.2', which is no axis and no block: did you mean 'layers.2'",
        ),
        ({"layers.0": 1, "layers.1": 2}, "no number for block 'layers.2', where axis 'layers.2.up.weight:0' lies"),
        ({"layers.0": 1, "layers.1": 2, "layers.2": np.nan}, "of 'layers.2' is nan: give a finite number"),
        ({"layers.0": "much"}, "of 'layers.0' is 'much': give a finite number"),
        ([1, 2, 3], "are a list: give a mapping"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(stack: Graph, make: Callable[..., Any], given: Any, says: str) -> None:
    allocation = make(lambda graph: given)
    with pytest.raises(ScoreError, match=says):
        allocated(stack, allocation, random_scores(stack))


# Names


def test_every_name_makes_an_allocation() -> None:
    for name in allocations.names():
        made = allocations.named(name, **{option: {} for option in allocations.needs(name)})
        assert callable(made)
    assert allocations.named("owl", spread=0.1) == allocations.Owl(spread=0.1)
    assert allocations.named("al-mm") == allocations.Standardised("AL-MM")
    assert [name for name in allocations.names() if allocations.needs(name)] == ["cfsp", "adapt-pruner"]


def test_names_and_options_are_checked() -> None:
    with pytest.raises(ScoreError, match="unknown allocation 'unifrom': did you mean 'uniform'"):
        allocations.named("unifrom")
    with pytest.raises(ScoreError, match="allocation 'owl' has no option 'width': it takes ratios, spread, times"):
        allocations.named("owl", width=1)
    with pytest.raises(ScoreError, match="allocation 'cfsp' needs importances"):
        allocations.named("cfsp")
    with pytest.raises(ScoreError, match="unknown structure 'AL'"):
        allocations.Standardised("AL")
