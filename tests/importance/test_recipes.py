"""Recipes: all of them on a language model, steps that make up for what went, protected ends, what they give back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import NothingToPrune, PlanError, ScoreError
from importance import Compensation, Magnitude, OptimalBrain, Pace, Recipe, Schedule, allocations, recipes
from importance.remembered import remembering
from importance.units import units
from tests.zoo import MODULES, ZOO

TARGET = depgraph.Target(params=0.85)
EXPERTS = ("stun", "minitron_experts")
SMALL = {"bonsai": {"masks": 4}, "llm_surgeon": {"shots": 2}, "obs": {"rounds": 2}}


def zoo_graph(name: str) -> depgraph.DependencyGraph:
    example = {**ZOO, **MODULES}[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


@pytest.fixture(scope="module")
def qwen() -> depgraph.DependencyGraph:
    return zoo_graph("qwen3")


SLOW = {"slicegpt_shortcuts": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in recipes.RECIPES if n not in EXPERTS])
def test_every_recipe_prunes_a_language_model(qwen: depgraph.DependencyGraph, name: str) -> None:
    entry = recipes.RECIPES[name]
    given = {} if entry.needs == "nothing" else {"batches": [qwen.kwargs]}
    made = entry.make(**given, **SMALL.get(name, {}))
    before = {n: t.clone() for n, t in qwen.model.state_dict().items()}
    target = depgraph.Target(params=0.93) if name in ("llm_pruner", "cfsp") else TARGET
    pruned = made.prune(qwen, target)
    assert made.name == name
    bias = sum(
        pruned.model.get_parameter(n).numel() for n in (pruned.compensated.created if pruned.compensated else ())
    )
    cost = depgraph.trace(pruned.model, (), qwen.kwargs).dense_cost.params
    assert cost - bias <= target.shares["params"] * qwen.dense_cost.params
    assert (pruned.scheduled is None) == (made.schedule is None) == (pruned.report is not None)
    assert pruned.plan is not None and (made.prepare is not None or pruned.plan.cost().params == cost - bias)
    assert all(torch.equal(t, before[n]) for n, t in qwen.model.state_dict().items())


@pytest.mark.parametrize("name", EXPERTS)
def test_recipes_for_experts_take_experts_and_nothing_else(name: str) -> None:
    graph = zoo_graph("mixtral")
    recipe = recipes.named(name, [graph.kwargs])
    pruned = recipe.prune(graph, depgraph.Target(params=0.8))
    assert pruned.plan is not None and pruned.plan.removal
    assert set(pruned.plan.removal) <= set(units(graph, "experts"))
    assert pruned.report is not None and pruned.report.after.params <= 0.8 * graph.dense_cost.params
    with pytest.raises(NothingToPrune, match="no axis of the kind 'experts'"):
        recipe.plan(zoo_graph("gpt2"), TARGET)


def test_a_pace_takes_as_many_steps_as_it_needs() -> None:
    pace = Pace(0.05)
    assert [pace(depgraph.Target(params=keep)).steps for keep in (0.95, 0.9, 0.88, 0.5)] == [1, 2, 3, 10]
    assert pace(depgraph.Target(params=0.9, macs=0.7)).steps == 6
    with pytest.raises(PlanError, match="share=0"):
        Pace(0)


def doubled() -> tuple[nn.Sequential, Tensor]:
    """Every neuron stands twice: half of them can go without a loss, if what stays takes their place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        model[0].weight[8:], model[0].bias[8:] = model[0].weight[:8], model[0].bias[:8]
    return model, torch.randn(200, 6, dtype=torch.float64)


def test_each_step_makes_up_for_what_went() -> None:
    model, x = doubled()
    graph = depgraph.trace(model, x[:2])
    score = OptimalBrain([x], damping=1e-9, rounds=16)
    how = Compensation(damping=1e-10)
    errors = []
    for compensation in (how, None):
        recipe = Recipe("obs", score, [x], compensation=compensation, schedule=Schedule(3, "linear"))
        pruned = recipe.prune(graph, depgraph.Target(params=0.52))
        assert pruned.scheduled is not None
        assert len(pruned.scheduled.steps) == 3
        errors.append(float((pruned.model(x) - model(x)).detach().abs().max()))
    assert errors[0] < 1e-6 < 1e-2 < errors[1]


def test_biases_made_in_one_step_count_in_the_next() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    graph = depgraph.trace(model, torch.randn(2, 6))
    x = torch.randn(32, 6)
    recipe = Recipe("bias", Magnitude(), [x], compensation=Compensation("bias"), schedule=Schedule(2, "linear"))
    pruned = recipe.prune(graph, depgraph.Target(params=0.6))
    assert pruned.compensated is not None
    assert pruned.compensated.created == ("2.bias",)
    assert sum(p.numel() for p in pruned.model.parameters()) <= 0.6 * graph.dense_cost.params


class Blocks(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("count", "first", "last"), [(32, 4, 2), (16, 2, 1), (5, 1, 0), (2, 0, 0)])
def test_llm_pruner_leaves_its_share_of_the_first_and_last_blocks_whole(count: int, first: int, last: int) -> None:
    x = torch.randn(4, 8)
    graph = depgraph.trace(Blocks(count), x)
    recipe = recipes.llm_pruner([x], lambda output, batch: output.square().mean())
    within = allocations.axis_blocks(graph)
    touched = {within[name] for name in recipe.plan(graph, depgraph.Target(params=0.8)).removal}
    assert touched == {f"blocks.{k}" for k in range(first, count - last)}
    everywhere = recipe.plan(graph, depgraph.Target(params=0.8), protect=()).removal
    assert {within[name] for name in everywhere} == {f"blocks.{k}" for k in range(count)}


def test_what_follows_is_called_in_order_with_the_pruned_model() -> None:
    model, x = doubled()
    graph = depgraph.trace(model, x[:2])
    called: list[Any] = []
    recipe = Recipe("m", Magnitude(), afterwards=(lambda m: called.append((1, m)), lambda m: called.append((2, m))))
    pruned = recipe.prune(graph, depgraph.Target(params=0.7))
    assert called == [(1, pruned.model), (2, pruned.model)]


def test_errors_of_steps_say_which_and_leave_the_model() -> None:
    model, x = doubled()
    graph = depgraph.trace(model, x[:2])
    bad = [x[:, :3]]
    recipe = Recipe("m", Magnitude(), bad, compensation=Compensation(), schedule=Schedule(2, "linear"))
    with pytest.raises(depgraph.errors.DataError, match="step 1 of 2.*doesn't fit"):
        recipe.prune(graph, depgraph.Target(params=0.7))
    assert model[0].weight.shape == (16, 6)


def test_names_are_looked_up() -> None:
    assert recipes.named("bonsai", [1], seed=3).score.seed == 3  # type: ignore[attr-defined]
    with pytest.raises(ScoreError, match="unknown scope 'axes': did you mean 'axis'"):
        recipes.obs([torch.zeros(1)], scope="axes")
    with pytest.raises(ScoreError, match="unknown recipe 'bonzai': did you mean 'bonsai'"):
        recipes.named("bonzai")


def test_a_remembering_recipe_scores_once_and_prunes_the_same(qwen: depgraph.DependencyGraph) -> None:
    calls: list[int] = []

    class Counted(Magnitude):
        def __call__(self, graph: Any, /) -> Any:
            calls.append(1)
            return super().__call__(graph)

    plain = Recipe("counted", Counted(2.0))
    once = remembering(plain)
    for share in (0.9, 0.8):
        target = depgraph.Target(params=share)
        assert once.plan(qwen, target).removal == plain.plan(qwen, target).removal
    assert len(calls) == 3
    obs = recipes.obs([qwen.kwargs], rounds=2)
    assert remembering(obs).plan(qwen, TARGET).removal == obs.plan(qwen, TARGET).removal
