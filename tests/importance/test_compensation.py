"""Structured OBS and compensation: the numbers of METHODS.md 2.2 and 2.13, and what holds for them on any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import exporters
import importance
from depgraph.errors import ScoreError
from importance import Compensation, Gathering, Gram, Moments, OptimalBrain, Weights, collect, compensate
from importance.problems import Problem
from importance.refitting import refit
from tests.importance.test_activation import TWO_SEQUENCES, Net, TwoHeads
from tests.zoo import MODULES, ZOO

EXACT = Gathering(dtype=torch.float64)
ALL = (Gram(), Weights("square"), Moments("columns"))


def problem(weight: list[list[float]], gram: list[list[float]]) -> Problem:
    inverse = torch.linalg.inv(torch.tensor(gram, dtype=torch.float64))
    return Problem(torch.tensor(weight, dtype=torch.float64), inverse, np.arange(len(gram)))


def test_the_loss_and_update_of_one_column_by_hand() -> None:
    found = problem([[1, 1]], [[2, 1], [1, 2]])
    assert found.losses([0]) == {0: pytest.approx(1.5)}
    found.remove([0])
    assert found.weight.tolist() == [[0, pytest.approx(1.5)]]


def test_removing_one_by_one_costs_what_removing_together_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    gram = x.T @ x

    def costs(order: list[int]) -> tuple[float, Tensor]:
        found = Problem(weight.clone(), torch.linalg.inv(gram), np.arange(4))
        total = 0.0
        for column in order:
            total += found.losses([column])[column]
            found.remove([column])
        return total, found.weight

    together = Problem(weight.clone(), torch.linalg.inv(gram), np.array([0, 1, 0, 2]))
    joint = together.losses([0])[0]
    together.remove([0])
    for order in ([0, 2], [2, 0]):
        total, after = costs(order)
        assert total == pytest.approx(joint)
        assert torch.allclose(after, together.weight)
    error = (x @ (weight - together.weight).T).square().sum()
    assert float(error) == pytest.approx(joint)
    assert joint < float((x[:, [0, 2]] @ weight[:, [0, 2]].T).square().sum())


def test_uncorrelated_inputs_give_the_square_of_wanda() -> None:
    found = problem([[1, 2], [3, 4]], [[5, 0], [0, 7]])
    assert found.losses([0, 1]) == {0: pytest.approx(50), 1: pytest.approx(140)}
    found.remove([0])
    assert found.weight.tolist() == [[0, 2], [0, 4]]


def _cut(model: nn.Module, batches: list[Any], removal: dict[str, list[int]], how: Compensation) -> nn.Module:
    args = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    graph = depgraph.trace(model, args)
    plan = graph.cut_plan(removal)
    pruned = plan.apply()
    compensate(pruned, plan, collect(graph, batches, ALL, EXACT), how)
    return pruned


def test_the_bias_of_a_head_by_hand() -> None:
    """METHODS.md 2.2: head 1 goes, the bias is [1, 4] and the mean output is what it was."""
    model = TwoHeads()
    graph = depgraph.trace(model, TWO_SEQUENCES)
    axis = next(a.name for a in graph.axes if a.size == 2 and any(m.target == "scale" for m in a.members))
    pruned = _cut(model, [TWO_SEQUENCES], {axis: [1]}, Compensation("bias"))
    assert pruned.out.bias.tolist() == pytest.approx([1, 4])
    assert torch.allclose(pruned(TWO_SEQUENCES).mean(0), model(TWO_SEQUENCES).mean(0), atol=1e-6)


def _net() -> tuple[Net, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(12), [torch.randn(16, 8, 5) for _ in range(3)]


def apart(a: nn.Module, b: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return max(float((a(x) - b(x)).abs().max()) for x in batches)


def test_a_doubled_neuron_goes_without_loss_under_least_squares() -> None:
    model, batches = _net()
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight[4] = layer.weight[1]
            layer.bias[4] = layer.bias[1]
    columns = model.down.weight[:, 1] + model.down.weight[:, 4]
    pruned = _cut(model, batches, {"gate.weight:0": [4]}, Compensation(damping=1e-9))
    assert apart(model, pruned, batches) < 1e-4
    assert torch.allclose(pruned.down.weight[:, 1], columns, atol=1e-3)


def test_a_constant_neuron_goes_without_loss_under_a_bias() -> None:
    model, batches = _net()
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight[4] = 0
            layer.bias[4] = 1.5
    for how in (Compensation("bias"), Compensation()):
        assert apart(model, _cut(model, batches, {"gate.weight:0": [4]}, how), batches) < 1e-5


@pytest.mark.parametrize("kind", ["bias", "least-squares"])
def test_the_mean_output_of_consumers_is_kept(kind: str) -> None:
    model, batches = _net()
    pruned = _cut(model, batches, {"gate.weight:0": [0, 3, 7]}, Compensation(kind))
    x = torch.cat(batches)
    with torch.no_grad():
        assert torch.allclose(pruned(x).mean((0, 1)), model(x).mean((0, 1)), atol=1e-5)


def test_least_squares_beats_the_bias_and_the_bias_beats_nothing() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    plan = graph.cut_plan({"gate.weight:0": [0, 2, 3, 7]})
    x = torch.cat(batches)

    def error(how: Compensation | None) -> float:
        pruned = plan.apply()
        if how is not None:
            compensate(pruned, plan, batches, how, EXACT)
        with torch.no_grad():
            return float((pruned(x) - model(x)).square().mean())

    plain, bias, alone, both = (
        error(h) for h in (None, Compensation("bias"), Compensation(biases="none"), Compensation())
    )
    assert both < bias < plain
    assert both < alone < plain


def test_it_is_the_least_squares_solution() -> None:
    model, batches = _net()
    gone, stays = [0, 2, 3, 7], [1, 4, 5, 6, 8, 9, 10, 11]
    pruned = _cut(model, batches, {"gate.weight:0": gone}, Compensation(damping=0))
    with torch.no_grad():
        h = torch.tanh(model.embed(torch.cat(batches))).reshape(-1, 8)
        x = (nn.functional.silu(model.gate(h)) * model.up(h)).double()
        y = model.down(x.float()).double()
        kept = torch.cat([x[:, stays], torch.ones(len(x), 1)], dim=1)
        solution = torch.linalg.lstsq(kept, y).solution
    assert torch.allclose(pruned.down.weight.double(), solution[:-1].T, atol=1e-4)
    assert torch.allclose(pruned.down.bias.double(), solution[-1], atol=1e-4)


def test_windows_of_convolutions_are_columns() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        first, second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False)
        model, x = nn.Sequential(first, nn.ReLU(), second), torch.randn(8, 3, 9, 9)
    with torch.no_grad():
        first.weight[5] = first.weight[2]
        first.bias[5] = first.bias[2]  # type: ignore[index]
    pruned = _cut(model, [x], {"0.weight:0": [5]}, Compensation(damping=1e-9))
    assert apart(model, pruned, [x]) < 1e-3


@pytest.mark.parametrize(
    "name", ["resnet_basic", "mobilenet_v2", "llama_8_2", "vit", "mixtral", "group_norm_cnn", "mamba"]
)
def test_compensation_helps_any_model_and_saves(name: str, tmp_path: Path) -> None:
    example = {**ZOO, **MODULES}[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    batch = example.kwargs or example.args
    found = collect(graph, [batch], ALL)
    plan = graph.plan(OptimalBrain(found), depgraph.Target(params=0.85), scope="axis", form="module")
    plain, pruned = plan.apply(), plan.apply()
    done = compensate(pruned, plan, found)
    assert done.changed

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = model(*example.args, **example.kwargs)
        return out if isinstance(out, Tensor) else out[0]

    dense = output(example.model)
    assert (output(pruned) - dense).square().mean() < 0.7 * (output(plain) - dense).square().mean()
    depgraph.save(pruned, tmp_path / "pruned")
    loaded = depgraph.load(tmp_path / "pruned", {**ZOO, **MODULES}[name]().model)
    assert torch.equal(output(loaded), output(pruned))


def test_a_created_bias_is_exported(tmp_path: Path) -> None:
    example = ZOO["llama_8_2"]()
    inputs = {"input_ids": example.kwargs["input_ids"]}
    graph = depgraph.trace(example.model, (), inputs)
    plan = graph.plan(OptimalBrain([inputs]), depgraph.Target(params=0.85), scope="axis")
    pruned = plan.apply()
    done = compensate(pruned, plan, [inputs])
    assert done.created
    exporters.to_onnx(pruned, (), tmp_path / "m.onnx", kwargs=inputs)  # compares it with the model


def test_weights_that_something_else_reads_stay() -> None:
    example = MODULES["tied_weights"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    plan = graph.plan(OptimalBrain([example.args]), depgraph.Target(params=0.8))
    pruned = plan.apply()
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    done = compensate(pruned, plan, [example.args])
    assert not done.changed and "reads it too" in done.left[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in pruned.state_dict().items())


def test_greedy_order_and_totals() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    found = collect(graph, batches, ALL, EXACT)
    once, greedy = OptimalBrain(found)(graph), OptimalBrain(found, rounds=12)(graph)
    name = "gate.weight:0"
    assert int(np.argmin(once[name])) == int(np.argmin(greedy[name]))
    assert (greedy[name] >= once[name] - 1e-12).all()


def test_a_singular_gram_matrix_is_named() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    few = [batches[0][:1, :2]]
    with pytest.raises(ScoreError, match=r"X'X of the input of .* is singular .*use damping above 0, or more data"):
        OptimalBrain(few, damping=0)(graph)
    assert np.isfinite(OptimalBrain(few)(graph)["gate.weight:0"]).all()
    with pytest.raises(ScoreError, match="damping must be"):
        Compensation(damping=-1)
    with pytest.raises(ScoreError, match=r"unknown kind of compensation 'ols'"):
        Compensation("ols")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def deep() -> tuple[depgraph.DependencyGraph, list[torch.Tensor]]:
    """Five blocks in a list, whose numbers move up where one of them leaves, and batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), *[_Block() for _ in range(5)], nn.Linear(8, 3)).eval()
        batches = [torch.randn(32, 5) for _ in range(3)]
    return depgraph.trace(model, batches[0]), batches


@pytest.mark.parametrize("how", [Compensation("bias"), Compensation(biases="existing")])
def test_behind_a_block_that_left_the_same_parameters_make_up(deep: Any, how: Compensation) -> None:
    graph, batches = deep
    names = [name for name in (a.name for a in graph.axes) if graph[name].size == 24]
    narrow = graph.cut_plan({name: range(8) for name in names})
    whole, short = narrow.apply(), narrow.with_branches("2").apply()
    first = compensate(whole, narrow, batches, how)
    second = compensate(short, narrow.with_branches("2"), batches, how)
    assert set(first.changed) - set(second.changed) == {n for n in first.changed if n.startswith("2.")} != set()
    for kept, old in enumerate((1, 3, 4, 5), start=1):
        for name, tensor in whole[old].named_parameters():
            torch.testing.assert_close(short[kept].get_parameter(name), tensor)


def test_what_stands_behind_a_block_that_left_is_fitted_to_what_it_was(deep: Any) -> None:
    graph, batches = deep
    plan = graph.cut_plan(branches=["2", "4"])
    plain, fitted = plan.apply(), plan.apply()
    done = refit(fitted, plan, batches, Compensation(biases="existing", inputs="pruned"))
    assert not any(name.startswith(("2.", "4.")) for name in done.changed)
    assert {name.partition(".")[0] for name in done.changed} == {"1", "3", "5", "6"}

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((model(x) - graph.model(x)).square().sum() for x in batches))

    assert error(fitted) < 0.8 * error(plain)


class Recurrent(nn.Module):
    """Two recurrent layers between linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(6, 12), nn.LSTM(12, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.rnn(self.embed(x))[0])
        return found


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_recurrent_weights_that_take_nothing_over_are_named(inputs: str) -> None:
    model, batches = Recurrent(), [torch.randn(4, 5, 6)]
    graph = depgraph.trace(model, batches[0])
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))
    make_up = refit if inputs == "pruned" else compensate
    made = make_up(plan.apply(), plan, batches, Compensation(inputs=inputs))
    assert {"rnn.weight_hh_l0", "rnn.weight_ih_l1", "rnn.weight_hh_l1"} == {line.split(":")[0] for line in made.left}
    assert "head.weight" in made.changed and "3 stay as they were" in str(made)


@pytest.mark.parametrize("way", [compensate, refit])
def test_without_damping_a_singular_gram_matrix_is_named_before_weights_are_noise(way: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    batches = [torch.randn(2, 4) for _ in range(3)]
    graph = depgraph.trace(model, batches[0])
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.9))
    pruned: Any = plan.apply()
    before = pruned[2].weight.clone()
    with pytest.raises(
        ScoreError, match=r"X'X of the input of 2.weight is singular .*use damping above 0, or more data"
    ):
        way(pruned, plan, batches, importance.Compensation(biases="existing", damping=0.0))
    assert torch.equal(pruned[2].weight, before)


def test_another_model_than_the_plan_gave_is_refused() -> None:
    model, batches = _net()
    plan = depgraph.trace(model, batches[0]).cut_plan({"gate.weight:0": [4]})
    with pytest.raises(ScoreError, match=r"Linear has no parameter '[\w.]+': give the model that plan.apply\(\) gave"):
        importance.compensate(nn.Linear(3, 4), plan, batches)
