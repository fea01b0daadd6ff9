"""Pruning in steps: curves, exact budgets, scoring anew, what happens between steps, and errors on the way."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import PlanError, ScoreError, TargetError
from importance import Schedule, Step, allocations
from tests.zoo import MODULES, ZOO

Graph = depgraph.DependencyGraph
HALF = depgraph.Target(params=0.5)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture
def graph() -> Graph:
    return depgraph.trace(mlp(), torch.randn(2, 8))


def zoo_graph(name: str) -> Graph:
    example = {**ZOO, **MODULES}[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


def largest_group(graph: Graph, metric: str) -> int:
    dense = getattr(graph.dense_cost, metric)
    return max(
        dense - getattr(graph.cost({axis.name: [g]}), metric)
        for axis in graph.axes
        for g in np.flatnonzero(axis.prunable)
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Curves


def test_the_cubic_curve_of_the_published_example() -> None:
    assert Schedule(4).gone(0.8) == pytest.approx([0.4625, 0.7, 0.7875, 0.8])


def test_other_curves() -> None:
    assert Schedule(4, "linear").gone(0.8) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    left = 1 - np.array([0.0, *Schedule(4, "geometric").gone(0.8)])
    assert left[1:] / left[:-1] == pytest.approx([0.2**0.25] * 4)
    assert Schedule(2, lambda progress, final: final * progress**2).gone(0.8) == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("curve", ["cubic", "linear", "geometric"])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_curves_rise_to_the_target_exactly(curve: str, steps: int) -> None:
    gone = Schedule(steps, curve).gone(0.37)
    assert len(gone) == steps
    assert gone[-1] == 0.37
    assert gone == sorted(gone)


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        (lambda progress, final: 0.5, "ends in 0.5: at progress 1 it must give"),
        (lambda progress, final: final * (3 - 2 * progress), "must rise from 0, and never fall"),
        (lambda progress, final: final * (2 * progress - 1), "must rise from 0, and never fall"),
    ],
)
def test_curves_that_do_not_rise_to_the_target_are_refused(graph: Graph, curve: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Schedule(4, curve).apply(graph, importance.Magnitude(), depgraph.Target(params=0.7))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": 0}, "steps=0: give a whole number, 1 or more"),
        ({"steps": True}, "steps=True"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"after_step": "train"}, "after_step='train' can't be called"),
        ({"progress": "loud"}, "progress='loud'"),
    ],
)
def test_options_are_checked(given: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Schedule(**given)
    with pytest.raises(ScoreError, match="unknown curve of a schedule 'cubik': did you mean 'cubic'"):
        Schedule(curve="cubik")


# Budgets


@pytest.mark.parametrize(
    ("name", "metric"), [("llama_8_4", "params"), ("resnet_basic", "macs"), ("residual_cnn", "params")]
)
def test_every_step_meets_its_part_of_the_budget_in_exact_cost(name: str, metric: str) -> None:
    graph = zoo_graph(name)
    before = state(graph.model)
    done = Schedule(3).apply(graph, importance.Magnitude(), depgraph.Target(**{metric: 0.5}))
    dense, step = getattr(graph.dense_cost, metric), largest_group(graph, metric)
    costs = [getattr(s.cost, metric) for s in done.steps]
    for wanted, cost in zip([1 - gone for gone in Schedule(3).gone(0.5)], costs, strict=True):
        assert wanted * dense - step < cost <= wanted * dense
    assert costs == sorted(costs, reverse=True)
    assert done.before == graph.dense_cost
    assert done.after == depgraph.trace(done.model, graph.args, graph.kwargs).dense_cost
    assert all(s.check is None or not s.check.vacuous for s in done.steps)
    cuts = [s for s, before in zip(done.steps, [dense, *costs], strict=False) if getattr(s.cost, metric) < before]
    assert all(s.check is not None for s in cuts)
    assert equal(before, state(graph.model))
    assert not hasattr(graph.model, "depgraph_record")


@pytest.mark.parametrize("name", ["llama_8_4", "residual_cnn"])
def test_one_step_is_one_shot(name: str) -> None:
    graph = zoo_graph(name)
    shot = graph.plan(importance.Magnitude(), HALF).apply()
    done = Schedule(1).apply(graph, importance.Magnitude(), HALF)
    assert equal(state(done.model), state(shot))
    assert done.model.depgraph_record == shot.depgraph_record


def test_several_shares_hold_in_the_end(graph: Graph) -> None:
    target = depgraph.Target(params=0.5, macs=0.4)
    done = Schedule(3, "linear").apply(graph, importance.Magnitude(), target)
    shares = done.after.share_of(graph.dense_cost)
    assert shares["params"] <= 0.5
    assert 0.4 - 53 / graph.dense_cost.macs < shares["macs"] <= 0.4


def test_more_steps_than_groups_leave_out_some(graph: Graph) -> None:
    done = Schedule(60, "linear").apply(graph, importance.Magnitude(), depgraph.Target(params=0.9))
    assert 0.9 * graph.dense_cost.params - 53 < done.after.params <= 0.9 * graph.dense_cost.params
    assert len(done.steps) == 60
    cuts = [step for step in done.steps if step.check is not None]
    assert len(cuts) == 1 + len(done.model.depgraph_record["earlier"]) < 10  # type: ignore[operator, index]


def test_options_hold_in_every_step() -> None:
    graph = zoo_graph("llama_8_4")
    neurons = [axis.name for axis in graph.axes if ".mlp." in axis.name]
    done = Schedule(2).apply(graph, importance.Magnitude(), depgraph.Target(params=0.7), only=neurons, form="module")
    again = depgraph.trace(done.model, graph.args, graph.kwargs)
    changed = {axis.name for axis in graph.axes if axis.size != again[axis.name].size}
    assert changed
    assert all(".mlp." in name for name in changed)


def test_axes_named_by_their_position_are_the_same_in_every_step() -> None:
    """Slices of a fused weight are called [24:40] and [40:52] before the first cut, and otherwise after it."""
    graph = zoo_graph("split_sizes")
    whole, half = "fused.weight:0[24:40]", "fused.weight:0[40:52]"
    target = depgraph.Target(params=0.45)
    done = Schedule(4, "linear").apply(graph, importance.Magnitude(), target, protect=whole, floor={half: 0.5})
    assert done.model.sizes == [1, 16, 6]
    target = depgraph.Target(params=0.7)
    done = Schedule(4).apply(graph, importance.Magnitude(), target, only=[whole, half])
    assert done.model.sizes[0] == 24  # type: ignore[index]


def test_outputs_that_were_free_stay_free(graph: Graph) -> None:
    free = depgraph.trace(graph.model, graph.args, free=["output 0"])
    done = Schedule(3).apply(free, importance.Random(1), depgraph.Target(params=0.1), scope="axis")
    assert done.model(*graph.args).shape[-1] < 3


# Scoring anew


def test_each_step_is_scored_anew(graph: Graph) -> None:
    """After the first step some neurons are made large: the second keeps them, whatever they were before."""
    seen: list[list[int]] = []

    def scorer(graph: Graph, /) -> dict[str, np.ndarray]:
        seen.append([axis.size for axis in graph.axes])
        return importance.Magnitude()(graph)

    def grow(model: Any, step: Step) -> None:
        if step.number == 1:
            lowest = model[0].weight.norm(dim=1).argsort()[:10]
            with torch.no_grad():
                model[0].weight[lowest] *= 100
                model[0].bias[lowest] = 77.0

    done = Schedule(2, "linear", after_step=grow).apply(graph, scorer, HALF)
    assert len(seen) == 2
    assert all(later < earlier for earlier, later in zip(*seen, strict=True))
    assert int((done.model[0].bias == 77.0).sum()) == 10  # type: ignore[index, union-attr]


def test_scores_by_axis_fit_one_step_only(graph: Graph) -> None:
    scores = importance.Magnitude()(graph)
    assert Schedule().apply(graph, scores, HALF).after.params <= 0.5 * graph.dense_cost.params  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="2 steps need a scorer, which is called in each"):
        Schedule(2).apply(graph, scores, HALF)  # type: ignore[arg-type]


def test_allocations_and_gradients_go_in_steps() -> None:
    graph = zoo_graph("llama_8_4")
    batches = [{"input_ids": torch.randint(0, 90, (2, 9))}]
    scorer = importance.Allocated(importance.Taylor(batches), allocations.Standardised())
    one, two = (Schedule(2).apply(graph, scorer, depgraph.Target(params=0.7)) for _ in range(2))
    assert one.after.params <= 0.7 * graph.dense_cost.params
    assert equal(state(one.model), state(two.model))


# Between steps


def test_what_is_trained_between_steps_is_kept(graph: Graph) -> None:
    steps = []

    def train(model: nn.Module, step: Step) -> None:
        steps.append((step.number, step.steps, step.cost.params, sum(p.numel() for p in model.parameters())))
        model.train()
        with torch.no_grad():
            model[4].bias += 1  # type: ignore[index, union-attr]

    done = Schedule(3, after_step=train, progress="bar").apply(graph, importance.Magnitude(), HALF)
    assert [(number, of) for number, of, _, _ in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(said == counted for _, _, said, counted in steps)
    assert torch.allclose(done.model[4].bias, graph.model[4].bias + 3)  # type: ignore[index, union-attr]
    assert done.model.training
    assert not graph.model.training


def test_training_never_touches_the_original(graph: Graph) -> None:
    """Also where the first step has nothing to cut yet."""
    before = state(graph.model)

    def spoil(model: nn.Module, step: Step) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.01

    late = Schedule(3, lambda progress, final: final if progress == 1 else 0.0, after_step=spoil)
    done = late.apply(graph, importance.Magnitude(), HALF)
    assert equal(state(graph.model), before)
    assert [step.cost.params for step in done.steps[:2]] == [graph.dense_cost.params] * 2
    assert done.after.params <= 0.5 * graph.dense_cost.params


def test_while_one_model_is_trained_no_earlier_one_is_held(graph: Graph) -> None:
    models = []

    def watch(model: nn.Module, step: Step) -> None:
        models.append(weakref.ref(model))
        gc.collect()
        assert [held() is None for held in models] == [True] * (step.number - 1) + [False]

    Schedule(3, after_step=watch).apply(graph, importance.Magnitude(), HALF)
    assert len(models) == 3


def test_a_callback_may_not_change_shapes(graph: Graph) -> None:
    def widen(model: nn.Module, step: Step) -> None:
        model[4] = nn.Linear(model[4].in_features, 5)  # type: ignore[index, union-attr, operator]

    with pytest.raises(PlanError, match="step 2 of 2.*may change weights, not their shapes"):
        Schedule(2, after_step=widen).apply(graph, importance.Magnitude(), HALF)


# Errors on the way


def test_a_target_that_can_not_be_met_names_the_step_and_what_was_reached(graph: Graph) -> None:
    before = state(graph.model)
    with pytest.raises(TargetError) as refused:
        graph.plan(importance.Magnitude(), depgraph.Target(params=0.3), floor=0.65)
    assert refused.value.unmet is not None
    nearly = depgraph.Target(params=refused.value.unmet.least["params"] / graph.dense_cost.params - 0.005)
    with pytest.raises(
        TargetError, match=r"step 3 of 3, from a model with params=0\.\d+, macs=.*: a target of .* can't be met"
    ):
        Schedule(3, "linear").apply(graph, importance.Magnitude(), nearly, floor=0.65)
    nearly_all = Schedule(2, lambda progress, final: final if progress == 1 else 0.77)
    with pytest.raises(
        TargetError, match=r"step 2 of 2, from a model with params=0\.229.* leaves? no group that may go"
    ):
        nearly_all.apply(graph, importance.Magnitude(), depgraph.Target(params=0.22), only="2.weight:0")
    assert equal(state(graph.model), before)


def test_a_target_far_out_of_reach_is_refused_before_the_first_step(graph: Graph) -> None:
    scored = []

    def scorer(graph: Graph) -> dict[str, np.ndarray]:
        scored.append(graph)
        return importance.Magnitude()(graph)

    with pytest.raises(TargetError, match=r"^a target of params=0\.3 can't be met: .*params=0\.\d+ at the least"):
        Schedule(3).apply(graph, scorer, depgraph.Target(params=0.3), floor=0.65)
    assert not scored


def test_weights_spoilt_by_training_are_named_with_the_step(graph: Graph) -> None:
    def spoil(model: nn.Module, step: Step) -> None:
        with torch.no_grad():
            model[2].bias[0] = float("nan")  # type: ignore[index, union-attr]

    with pytest.raises(ScoreError, match=r"step 2 of 3, from a model with .*: parameter '2\.bias' holds NaN"):
        Schedule(3, after_step=spoil).apply(graph, importance.Magnitude(), HALF)
    assert all(torch.isfinite(p).all() for p in graph.model.parameters())


def test_errors_of_the_callback_are_its_own(graph: Graph) -> None:
    def fail(model: nn.Module, step: Step) -> None:
        raise ZeroDivisionError("my own")

    before = copy.deepcopy(graph.model)
    with pytest.raises(ZeroDivisionError, match="my own"):
        Schedule(2, after_step=fail).apply(graph, importance.Magnitude(), HALF)
    assert equal(state(graph.model), state(before))


def test_one_step_says_what_a_plan_says(graph: Graph) -> None:
    with pytest.raises(TargetError, match="^a target of params=0.1 can't be met"):
        Schedule().apply(graph, importance.Magnitude(), depgraph.Target(params=0.1), floor=0.9)
    with pytest.raises(TargetError, match=r"expected a Target such as depgraph\.Target"):
        Schedule().apply(graph, importance.Magnitude(), 0.5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="plan has no option 'foo'"):
        Schedule().apply(graph, importance.Magnitude(), HALF, foo=1)


# Saving


@pytest.mark.parametrize("name", ["llama_8_4", "residual_cnn"])
def test_a_model_pruned_in_steps_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    graph = zoo_graph(name)
    done = Schedule(3).apply(graph, importance.Magnitude(), HALF)
    assert done.model.depgraph_record["earlier"]  # type: ignore[index]
    depgraph.save(done.model, tmp_path / "small")
    again = depgraph.load(tmp_path / "small", model=zoo_graph(name).model)
    assert equal(state(again), state(done.model))
    with torch.no_grad():
        one, two = (model(*graph.args, **graph.kwargs) for model in (done.model, again))
    first = [getattr(output, "logits", output) for output in (one, two)]
    assert torch.equal(first[0], first[1])


def test_steps_print_what_was_reached(graph: Graph) -> None:
    text = str(Schedule(2, "linear").apply(graph, importance.Magnitude(), HALF))
    assert text.splitlines()[0].startswith("step 1 of 2: params=0.7")
    assert text.splitlines()[1].startswith("step 2 of 2: params=0.4")


# What the steps add up to


@pytest.mark.parametrize("name", ["llama_8_4", "residual_cnn"])
def test_all_steps_are_one_plan_of_the_first_graph(name: str) -> None:
    graph = zoo_graph(name)
    done = Schedule(3).apply(graph, importance.Magnitude(), HALF)
    assert done.plan is not None and done.plan.graph is graph
    assert done.plan.cost() == done.after
    assert equal(state(done.plan.apply()), state(done.model))


class _Pairs:
    """Milliseconds are pairs of groups, begun ones too, of every axis of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def ms(self, kept: Any, /) -> float:
        assert kept.widths is self.graph.widths
        gone = {name: int(mask.sum()) for name, mask in kept.masks.items()}
        return sum(-(-(axis.size - gone.get(axis.name, 0)) // 2) for axis in self.graph.axes)

    def parts(self, kept: Any, /) -> dict[str, float]:
        return {"all": self.ms(kept)}


def test_milliseconds_are_met_by_the_latency_model_of_the_first_graph(graph: Graph) -> None:
    latency = _Pairs(graph)
    dense = latency.ms(graph.widths.at({}))
    done = Schedule(3, "linear").apply(
        graph, importance.Magnitude(), depgraph.Target(latency_ms=0.4 * dense, latency=latency)
    )
    assert done.plan is not None and latency.ms(done.plan.kept()) <= 0.4 * dense
    assert [s.keep["latency"] for s in done.steps] == pytest.approx([0.8, 0.6, 0.4])
    assert all(0.35 < s.latency <= s.keep["latency"] for s in done.steps if s.latency is not None)
    assert "latency=0.4" in str(done)
    paced = importance.Recipe("paced", importance.Magnitude(), schedule=importance.Pace(0.1))
    both = depgraph.Target(latency_ms=0.8 * dense, latency=latency, bytes=graph.dense_cost.bytes * 3 // 4)
    pruned = paced.prune(graph, both)
    assert pruned.scheduled is not None and len(pruned.scheduled.steps) == 3
    assert pruned.after.bytes <= graph.dense_cost.bytes * 3 / 4
