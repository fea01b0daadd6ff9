"""Consumers fitted one after the other, and the recipe that is built of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import DataError, ScoreError
from importance import Compensation, OptimalBrain, compensate, recipes
from importance.refitting import refit
from importance.relative import RelativeLoss
from importance.rivals import Rivals, distance, mean_loss
from tests.importance.test_activation import Net
from tests.zoo import MODULES, ZOO


def _net() -> tuple[Net, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(12), [torch.randn(16, 8, 5) for _ in range(3)]


def squares(output: Any) -> Tensor:
    return (output if isinstance(output, Tensor) else output[0]).float().square().mean()


def test_the_last_consumer_is_the_least_squares_solution_for_pruned_inputs() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    plan = graph.plan(OptimalBrain(batches), depgraph.Target(params=0.6), scope="axis")
    pruned: Any = plan.apply()
    refit(pruned, plan, batches, Compensation(damping=0))
    seen: list[Tensor] = []
    pruned.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        wanted = torch.cat([model(x) for x in batches]).reshape(-1, 3).double()
        got = torch.cat([pruned(x) for x in batches]).reshape(-1, 3).double()
    inputs = torch.cat(seen).reshape(len(wanted), -1).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    best = inputs @ torch.linalg.lstsq(inputs, wanted).solution
    assert float((got - wanted).square().mean()) == pytest.approx(float((best - wanted).square().mean()), rel=1e-3)


def test_it_beats_solving_each_for_dense_inputs() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    plan = graph.plan(OptimalBrain(batches), depgraph.Target(params=0.6), scope="axis")

    def error(make_up: Any) -> float:
        pruned = plan.apply()
        make_up(pruned, plan, batches, Compensation())
        with torch.no_grad():
            return sum(float((pruned(x) - model(x)).square().mean()) for x in batches)

    assert error(refit) < error(compensate)


def test_nothing_cut_changes_nothing() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    plan = graph.cut_plan({})
    pruned = plan.apply()
    refit(pruned, plan, batches)
    with torch.no_grad():
        assert torch.allclose(pruned(batches[0]), model(batches[0]), atol=1e-4)


def test_a_failure_leaves_the_pruned_model_as_it_was() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    plan = graph.plan(OptimalBrain(batches), depgraph.Target(params=0.6), scope="axis")
    pruned = plan.apply()
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    with pytest.raises(ScoreError, match="NaN or infinity comes in at"):
        refit(pruned, plan, [torch.full((1, 2, 5), torch.nan)])
    with pytest.raises(DataError, match="no batches"):
        refit(pruned, plan, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in pruned.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "resnet_basic", "mixtral", "llama_8_4"])
def test_the_best_recipe_works_on_any_architecture(name: str) -> None:
    example = {**ZOO, **MODULES}[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    batch = example.kwargs or example.args
    made = recipes.best([batch], lambda output, _: squares(output)).prune(graph, depgraph.Target(params=0.8))
    assert made.report is not None and made.report.after.params <= 0.8 * made.report.before.params
    assert made.compensated is not None and made.compensated.changed and not made.compensated.created
    with torch.no_grad():
        assert bool(torch.isfinite(squares(made.model(*example.args, **example.kwargs))))


def test_relative_losses_do_not_depend_on_the_size_of_a_consumers_output() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    before = RelativeLoss(batches, weight="share")(graph)["gate.weight:0"]
    with torch.no_grad():
        model.down.weight.mul_(10)
    after = RelativeLoss(batches, weight="share")(depgraph.trace(model, batches[0]))["gate.weight:0"]
    assert after == pytest.approx(before, rel=1e-4)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ScoreError, match="unknown weight of axes 'equal'"):
        RelativeLoss([torch.zeros(1)], weight="equal")
    with pytest.raises(ScoreError, match="unknown kind of inputs 'sparse'"):
        Compensation(inputs="sparse")
    with pytest.raises(ScoreError, match='several to choose from go with inputs="pruned" only'):
        Compensation(damping=(0.01, 0.1))
    with pytest.raises(ScoreError, match="damping must be a finite number of at least 0, or several"):
        Compensation(damping=(), inputs="pruned")
    with pytest.raises(ScoreError, match="'best' needs calibration data"):
        recipes.named("best")


def test_of_rivals_the_one_with_the_lower_loss_is_taken() -> None:
    model, batches = _net()
    graph, target = depgraph.trace(model, batches[0]), depgraph.Target(params=0.7)

    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return (output - model(batch)).square().mean()

    good, bad = recipes.obs(batches), replace(recipes.random(seed=1), units="all")
    for order in ((good, bad), (bad, good)):
        found = Rivals("either", None, batches, units="all", loss=loss, rivals=order)
        alone = replace(good, units="all").prune(graph, target)
        made = found.prune(graph, target)
        assert mean_loss(model, made.model, batches, loss) <= mean_loss(model, alone.model, batches, loss) * 1.0001
        assert found.plan(graph, target).removal == made.plan.removal  # type: ignore[union-attr]


def test_without_a_loss_the_one_with_the_nearer_outputs_is_taken() -> None:
    model, batches = _net()
    graph, target = depgraph.trace(model, batches[0]), depgraph.Target(params=0.7)
    good, bad = replace(recipes.obs(batches), units="all"), replace(recipes.random(seed=1), units="all")
    near, far = (distance(model, one.prune(graph, target).model, batches) for one in (good, bad))
    assert near is not None and far is not None and 0 < near < far
    for order in ((good, bad), (bad, good)):
        made = Rivals("either", None, batches, units="all", rivals=order).prune(graph, target).model
        assert distance(model, made, batches) == pytest.approx(near)


def test_the_distance_is_a_share_of_the_outputs() -> None:
    model, (x, *_) = _net()
    twice: Any = copy.deepcopy(model)
    with torch.no_grad():
        twice.head.weight.mul_(2)
        twice.head.bias.mul_(2)
    assert distance(model, twice, [x]) == pytest.approx(1, rel=1e-5)
    assert distance(model, model, [x]) == 0
    assert distance(nn.Identity(), nn.Linear(5, 3), [x]) is None  # other shapes tell nothing


def test_rivals_need_something_to_choose_by() -> None:
    model, batches = _net()
    found = Rivals("either", None, [], units="all", rivals=(recipes.random(seed=1),))
    with pytest.raises(ScoreError, match="no batches to choose between recipes by"):
        found.prune(depgraph.trace(model, batches[0]), depgraph.Target(params=0.7))


def test_what_is_fitted_to_the_pruned_models_inputs_needs_no_statistics_of_the_dense_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = _net()
    graph, passes = depgraph.trace(model, batches[0]), []
    monkeypatch.setattr("importance.recipe.collect", lambda *given: passes.append(given))
    how = Compensation(biases="existing", inputs="pruned")
    done = replace(recipes.magnitude(), batches=batches, compensation=how, units="all").prune(
        graph, depgraph.Target(params=0.7)
    )
    assert done.compensated is not None and done.compensated.changed and not passes


class Picking(nn.Module):
    """Tokens that a layer scores highest go on; `listed` ones are found one expert at a time, else by their indices."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.listed = listed
        self.embed, self.score = nn.Linear(6, 24), nn.Linear(24, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 5)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.embed(x))
        scores = self.score(h)
        if self.listed:
            best, out = scores.argmax(-1), h.new_zeros(*h.shape[:-1], 5)
            for number, expert in enumerate(self.experts):
                at = torch.where(best == number)
                out[at] = expert(h[at])
            return out
        picks = scores[..., :1].topk(3, dim=1).indices
        here = h.gather(1, picks.expand(-1, -1, h.shape[-1]))
        return sum(expert(here) for expert in self.experts).sum(1)


@pytest.mark.parametrize("listed", [True, False])
def test_rows_that_weights_pick_are_not_paired_with_others(listed: bool) -> None:
    torch.manual_seed(0)
    model = Picking(listed).eval()
    batches = [torch.randn(8, 7, 6) for _ in range(3)]
    graph = depgraph.trace(model, batches[0])
    plan = graph.plan(OptimalBrain(batches, rounds=8), depgraph.Target(params=0.6), scope="axis")

    def error(*make_up: Any) -> float:
        pruned: Any = plan.apply()
        for way in make_up:
            way(pruned, plan, batches, Compensation(biases="existing"))
        with torch.no_grad():
            return sum(float((pruned(x) - model(x)).square().mean()) for x in batches)

    assert error(refit) < 1.05 * error(compensate) < error()
