"""Sequential propagation: the choices of pruning one block after the other, in one pass, on any model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import depgraph
import exporters
from depgraph import DependencyGraph, Target
from depgraph.cutting.sides import Side
from depgraph.errors import DataError, ScoreError
from importance import Activation, Compensation, Gathering, OptimalBrain, Recipe, Schedule, collect, recipes
from importance.allocations.allocated import ascending
from importance.compensation import compensate
from importance.propagation import reordered, sequential
from importance.refitting import refit
from importance.remembered import remembering
from importance.units import units
from tests.importance.stacks import decoder, texts
from tests.importance.test_recipes import Blocks
from tests.importance.test_refitting import squares
from tests.zoo import MODULES, ZOO

DOUBLE = Gathering(dtype=torch.float64)


def stack(count: int = 4) -> tuple[nn.Module, list[Tensor]]:
    """Residual blocks of 16 neurons each, large enough that a block feels what the ones before it lost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Blocks(count).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        return model, [torch.randn(40, 8, dtype=torch.float64) for _ in range(3)]


def counts(graph: DependencyGraph, groups: int) -> dict[str, list[int]]:
    """A removal of so many groups of every axis within a block."""
    return {name: list(range(groups)) for name in units(graph)}


def one_by_one(
    graph: DependencyGraph, score: Any, groups: int, how: Compensation | None
) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    """What sequential propagation is: every axis scored anew on a model that has really been cut so far."""
    batches, model, gone = score.data, graph.model, dict[str, list[int]]()
    for name in units(graph):
        here = depgraph.trace(model, batches[0])
        (now,) = (axis for axis in here.axes if axis.name == name)
        scores = score(here)[name]
        gone[name] = ascending(now, scores)[:groups].tolist()
        plan = here.cut_plan({name: gone[name]})
        model = plan.apply()
        if how is not None:
            compensate(model, plan, batches, how, DOUBLE)
        yield name, scores, gone[name]


@pytest.mark.parametrize(
    ("criterion", "how"),
    [
        ("wanda-sp", None),
        ("flap", Compensation("bias")),
        ("obs", Compensation()),
        ("obs", Compensation(biases="none")),
    ],
)
def test_each_axis_is_scored_as_on_a_model_that_was_cut_so_far(criterion: str, how: Compensation | None) -> None:
    model, batches = stack()
    graph = depgraph.trace(model, batches[0])
    score: Any = (
        OptimalBrain(batches, rounds=4, gathering=DOUBLE)
        if criterion == "obs"
        else Activation(batches, criterion, gathering=DOUBLE)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sequential(graph.cut_plan(counts(graph, 6)), score, how, DOUBLE)
    dense = score(graph)
    for name, scores, gone in one_by_one(graph, score, 6, how):
        assert found.scores[name] == pytest.approx(scores, rel=1e-8)
        assert sorted(ascending(graph[name], found.scores[name])[:6].tolist()) == sorted(gone)
    first, *later = units(graph)
    assert found.scores[first] == pytest.approx(dense[first], rel=1e-8)
    assert all(np.abs(found.scores[name] / dense[name] - 1).max() > 0.01 for name in later)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_recipe_cuts_what_it_found_and_makes_up_for_it_on_the_way() -> None:
    model, batches = stack()
    graph, target = depgraph.trace(model, batches[0]), Target(params=0.6)
    score = OptimalBrain(batches, rounds=4, gathering=DOUBLE)
    recipe = Recipe("obs", score, batches, compensation=Compensation(), gathering=DOUBLE, propagation="sequential")
    pruned, dense = recipe.prune(graph, target), replace(recipe, propagation="dense").prune(graph, target)
    assert pruned.plan is not None and dense.plan is not None and pruned.report is not None
    sizes = {name: len(groups) for name, groups in pruned.plan.removal.items()}
    assert sizes == {name: len(groups) for name, groups in dense.plan.removal.items()}
    assert pruned.plan.removal == recipe.plan(graph, target).removal != dense.plan.removal
    assert pruned.report.check is not None and pruned.report.after.params <= 0.6 * graph.dense_cost.params
    last = graph.model
    for name, groups in pruned.plan.removal.items():
        here = depgraph.trace(last, batches[0])
        plan = here.cut_plan({name: groups})
        last = plan.apply()
        compensate(last, plan, batches, Compensation(), DOUBLE)
    assert torch.allclose(pruned.model(batches[0]), last(batches[0]), rtol=1e-6, atol=1e-6)


def test_what_is_read_everywhere_is_settled_last_on_pruned_blocks() -> None:
    blocks, batches = stack()
    model = nn.Sequential(nn.Linear(8, 8), blocks, nn.Linear(8, 3)).double()
    graph = depgraph.trace(model, batches[0])
    (stream,) = units(graph, "stream")
    within = counts(graph, 6)
    score = Activation(batches, "activation", gathering=DOUBLE)
    found = sequential(graph.cut_plan({stream: [0, 1], **within}), score, None, DOUBLE)
    without = sequential(graph.cut_plan(within), score, None, DOUBLE)
    for name in within:
        np.testing.assert_array_equal(found.scores[name], without.scores[name])
    cut = graph.cut_plan({name: ascending(graph[name], found.scores[name])[:6] for name in within}).apply()
    assert found.scores[stream] == pytest.approx(score(depgraph.trace(cut, batches[0]))[stream], rel=1e-8)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "linear")
        return func(*args, **(kwargs or {}))


def test_it_costs_one_pass_however_many_blocks_there_are() -> None:
    for blocks in (2, 8):
        model, batches = stack(blocks)
        graph = depgraph.trace(model, batches[0])
        plan, score = graph.cut_plan(counts(graph, 6)), Activation(batches, "activation")
        with Products() as once:
            collect(graph, batches, score.needs)
        with Products() as walked:
            sequential(plan, score)
        assert walked.count == 2 * blocks * len(batches)
        assert once.count == walked.count - len(batches), "nothing that is looked at is computed from the last product"


@pytest.mark.parametrize("name", ["vit", "resnet_basic", "mixtral", "llama_8_2"])
def test_it_works_on_any_architecture(name: str) -> None:
    example = {**ZOO, **MODULES}[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    batch = example.kwargs or example.args
    for recipe in (recipes.wanda_sp([batch], "sequential"), recipes.obs([batch], rounds=2, propagation="sequential")):
        made = recipe.prune(graph, Target(params=0.85))
        assert made.report is not None and made.plan is not None and made.report.check is not None
        assert made.report.after.params <= 0.85 * graph.dense_cost.params
        with torch.no_grad():
            assert bool(torch.isfinite(squares(made.model(*example.args, **example.kwargs))))


def test_each_axis_sees_the_model_with_the_axes_before_it_zeroed() -> None:
    """Channels in which queries and keys meet, where there is no weight to change, are zeroed too."""
    model, batches = decoder(2), texts()
    graph = depgraph.trace(model, batches[0])
    stream = units(graph, "stream")
    names = [axis.name for axis in graph.axes if axis.prunable.any() and axis.name not in stream]
    score = Activation(batches, "activation", gathering=DOUBLE)
    found, dense = sequential(graph.cut_plan({name: [0, 1, 2] for name in names}), score, None, DOUBLE), score(graph)
    settled, gone = list(found.scores), dict[str, list[int]]()
    assert len(settled) == 6 and any("queries" in name for name in settled)
    for axis in settled:
        side = Side(graph.widths.at({}), graph.widths.at(gone))
        expected = replace(score, gathering=replace(DOUBLE, side=side))(graph)[axis]
        assert found.scores[axis] == pytest.approx(expected, rel=1e-8)
        gone[axis] = ascending(graph[axis], found.scores[axis])[:3].tolist()
    assert all(np.abs(found.scores[axis] - dense[axis]).max() > 1e-3 * dense[axis].max() for axis in settled[1:])


def test_a_file_gives_what_its_model_gives(tmp_path: Path) -> None:
    model, batches = stack(2)
    model, batches = model.float(), [batch.float() for batch in batches[:2]]
    exporters.to_onnx(model, (batches[0],), tmp_path / "m.onnx")
    graph, file = depgraph.trace(model, batches[0]), depgraph.trace(tmp_path / "m.onnx")
    given = [{file.observer().own.inputs[0]: batch.numpy()} for batch in batches]  # type: ignore[attr-defined]
    for recipe, theirs in (
        (recipes.obs(batches, rounds=2), recipes.obs(given, rounds=2)),
        (recipes.flap(batches), recipes.flap(given)),
    ):
        mine, other = (
            replace(one, propagation="sequential").plan(of, Target(params=0.6))
            for one, of in ((recipe, graph), (theirs, file))
        )
        assert list(mine.removal.values()) == list(other.removal.values())


def test_the_best_recipe_passes_it_on() -> None:
    model, batches = stack(3)
    graph = depgraph.trace(model, batches[0])
    target = Target(params=0.6)
    best = replace(recipes.best(batches, lambda output, _: squares(output)), propagation="sequential")
    rivals = best.rivals  # type: ignore[attr-defined]
    assert [one.may_be_sequential for one in rivals] == [True, False, True]  # the second's score takes a backward pass
    ways = [replace(one, propagation="sequential") if one.may_be_sequential else one for one in rivals]
    alone = [way.plan(graph, target).removal for way in ways]
    made = best.prune(graph, target)
    assert made.plan is not None and made.plan.removal in alone


def test_gradients_are_on_afterwards_as_before() -> None:
    model, batches = stack(2)
    graph = depgraph.trace(model, batches[0])
    plan = graph.cut_plan(counts(graph, 6))
    sequential(plan, Activation(batches))
    assert torch.is_grad_enabled()
    refit(plan.apply(), plan, batches)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        sequential(plan, Activation(batches))
        assert not torch.is_grad_enabled()


def test_scores_are_handed_out_in_another_order() -> None:
    model, batches = stack(2)
    graph = depgraph.trace(model, batches[0])
    first, second = units(graph)
    scores = {axis.name: np.arange(axis.size, dtype=float) // 2 for axis in graph.axes}
    order = {second: np.arange(16.0)[::-1]}
    found = reordered(graph, scores, order)
    assert found[second] == pytest.approx(scores[second][::-1])
    assert (np.diff(found[second][::-1]) > 0).all(), "ties go by the new order"
    assert found[first] is scores[first]


def test_what_cant_be_sequential_is_refused() -> None:
    model, batches = stack(2)
    graph = depgraph.trace(model, batches[0])
    with pytest.raises(ScoreError, match="unknown propagation 'sequentially': did you mean 'sequential'"):
        Recipe("r", Activation(batches), propagation="sequentially")
    for recipe in (
        Recipe("r", Activation(batches), schedule=Schedule(2)),
        recipes.magnitude(),
        recipes.llm_pruner(batches),
        Recipe("r", Activation(collect(graph, batches, [Activation(batches)]))),
    ):
        with pytest.raises(ScoreError, match="can't be sequential: it takes one shot, and a score of what comes into"):
            replace(recipe, propagation="sequential")
    with pytest.raises(DataError, match="no batches to score with"):
        sequential(graph.cut_plan(counts(graph, 2)), Activation([]))
    with pytest.raises(DataError, match="a generator gives its batches only once"):
        replace(recipes.wanda_sp(iter(batches)), propagation="sequential").prune(graph, Target(params=0.8))
    with pytest.raises(ScoreError, match="give the score batches, not statistics"):
        sequential(graph.cut_plan({}), Activation(collect(graph, batches, [Activation(batches)])))
    again = replace(recipes.wanda_sp(batches), propagation="sequential")
    assert remembering(again) is again
    bad = [torch.full((2, 8), torch.nan, dtype=torch.float64)]
    with pytest.raises(ScoreError, match="NaN or infinity comes in at the input of blocks.0"):
        sequential(graph.cut_plan(counts(graph, 2)), Activation(bad))
