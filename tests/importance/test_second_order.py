"""Scores from the gradients of single samples: second-order Taylor, optimal brain damage, GBLM's gradient term."""

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
from depgraph.errors import DataError, ScoreError
from importance.splitting import sample_count, samples_of
from tests.importance.toys import Weights, axis, hand_graph, linear_loss, member, regression
from tests.zoo import MODULES, ZOO

W = [[1.0, -2.0], [3.0, 1.0]]
G = [[2.0, 1.0], [-1.0, 3.0]]
ONE = torch.tensor(1.0)
SCORES = ["taylor-second", "taylor-mix", "obd", "gblm-gradient", "llm-surgeon"]


def both_dims(model: nn.Module) -> Any:
    return hand_graph(model, axis("out", member("w", 0, [0, 1])), axis("in", member("w", 1, [0, 1])))


@pytest.mark.parametrize(("form", "out", "into"), [("second", [8, 18], [13, 13]), ("mix", [4, 9], [7.5, 5.5])])
def test_the_numbers_of_the_formula(form: str, out: list[float], into: list[float]) -> None:
    """METHODS.md 2.1: F = [[4, 1], [1, 9]] gives second-order rows [8, 18] and mix rows [4, 9]."""
    found = importance.SecondOrder([ONE], linear_loss(w=G), form=form)(both_dims(Weights(w=W)))
    np.testing.assert_allclose(found["out"], out)
    np.testing.assert_allclose(found["in"], into)


def test_the_fisher_diagonal_is_a_mean_over_samples() -> None:
    """METHODS.md 2.4: gradients 1 and 3 give F = 5, where a well-known library keeps 9, that of the last."""
    graph = hand_graph(Weights(w=[1.0, 2.0]), axis("a", member("w", 0, [0, 1])))
    batches = [torch.tensor(1.0), torch.tensor(3.0)]
    found = importance.SecondOrder(batches, linear_loss(w=[1.0, 1.0]))(graph)["a"]
    np.testing.assert_allclose(found, [5, 4 * 5])


@pytest.mark.parametrize(("norm", "size"), [("l2", 100 * 10**0.5), ("l1", 400)])
def test_gradients_are_joined_over_samples_element_by_element(norm: str, size: float) -> None:
    """METHODS.md 2.18: |W| * sqrt(sum (100 g)^2), or * sum |100 g|, for gradients that are 1 and -3 times G."""
    batches = [torch.tensor(1.0), torch.tensor(-3.0)]
    graph = both_dims(Weights(w=W))
    found = importance.GradientNorm(batches, linear_loss(w=G), norm)(graph)
    np.testing.assert_allclose(found["out"], [4 * size, 6 * size], rtol=1e-6)
    norms = importance.gradient_norms(graph, importance.Calibration(batches, linear_loss(w=G)), norm)
    np.testing.assert_allclose(norms["w"], np.abs(G) * size, rtol=1e-6)


def test_grouped_query_units_are_summed_contiguously() -> None:
    """METHODS.md 2.1: q scores [1, 2, 10, 20] on two KV heads give [3, 30]."""
    model = Weights(q=[[1.0], [2.0], [10.0], [20.0]])
    graph = hand_graph(model, axis("q", member("q", 0, [0, 0, 1, 1])))
    loss = linear_loss(q=[[1.0], [2**-0.5], [10**-0.5], [20**-0.5]])
    np.testing.assert_allclose(importance.SecondOrder([ONE], loss)(graph)["q"], [3, 30], rtol=1e-6)
    loss = linear_loss(q=[[0.01]] * 4)
    np.testing.assert_allclose(importance.GradientNorm([ONE], loss)(graph)["q"], [3, 30], rtol=1e-6)


def expected_scores(graph: depgraph.DependencyGraph, samples: list[Any], loss: Any, form: str) -> dict[str, np.ndarray]:
    """Group by group from the full gradients of samples; one loss for all of these together gives G."""
    tensors, model = graph.tensors(), graph.model

    def gradients(losses: list[Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        torch.stack(losses).mean().backward()
        return {name: t.grad.clone() for name, t in tensors.items()}

    alone = [gradients([loss(model(s[0]), s)]) for s in samples]
    together = gradients([loss(model(s[0]), s) for s in samples])
    saliency = {}
    for name, t in tensors.items():
        fisher = sum(g[name] ** 2 for g in alone) / len(samples)
        second = (t * fisher * t).detach()
        saliency[name] = second if form == "second" else (t * together[name] - second / 2).abs().detach()
    model.zero_grad()
    return {
        one.name: np.array(
            [
                sum(float(saliency[t].index_select(d, torch.as_tensor(i)).sum()) for t, d, i in one.group(k).members)
                for k in range(one.size)
            ]
        )
        for one in graph.axes
    }


@pytest.mark.parametrize("form", ["second", "mix"])
def test_scores_of_a_network_from_its_full_gradients(form: str) -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model.eval(), batches[0][0])
    samples = [sample for batch in batches for sample in samples_of(batch)]
    assert len(samples) == 12
    expected = expected_scores(graph, samples, loss, form)
    found = importance.SecondOrder(batches, loss, form=form)(graph)
    assert found.keys() == expected.keys() and expected
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


@pytest.mark.parametrize("name", SCORES)
def test_how_samples_are_put_into_batches_makes_no_difference(name: str) -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    x, y = (torch.cat([batch[k] for batch in batches]) for k in range(2))
    divided = [batches, [(x, y)], [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])], [(x.flip(0), y.flip(0))]]
    found = [importance.named(name, batches=d, loss=loss)(graph)["0.weight:0"] for d in divided]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3)


def test_signed_first_order_scores_count_a_batch_by_its_samples() -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    x, y = (torch.cat([batch[k] for batch in batches]) for k in range(2))
    parts = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = [
        importance.Taylor(b, loss, accumulate="signed", normalise="sum")(graph)["0.weight:0"] for b in ([(x, y)], parts)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


@pytest.mark.parametrize("name", [*SCORES, "taylor", "taylor-vector"])
def test_scores_follow_the_units_when_these_are_permuted(name: str) -> None:
    model, batches, loss = regression()
    order = torch.randperm(8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[3].weight.copy_(model[3].weight[:, order])
    scorer = importance.named(name, batches=batches, loss=loss)
    found = [scorer(depgraph.trace(m, batches[0][0]))["0.weight:0"] for m in (model, other)]
    np.testing.assert_allclose(found[1], found[0][order.numpy()], rtol=1e-3)


def test_first_order_scores_count_a_smaller_batch_less() -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    small = (batches[1][0][:2], batches[1][1][:2])
    alone = [importance.Taylor([batch], loss)(graph)["0.weight:0"] for batch in (batches[0], small)]
    found = importance.Taylor([batches[0], small], loss)(graph)["0.weight:0"]
    np.testing.assert_allclose(found, alone[0] + alone[1] / 2, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in importance.names() if n not in ("random", "stun")])
def test_units_of_any_score_are_removed_as_if_they_were_zero(name: str) -> None:
    """METHODS.md 8 F6 and F7, on KV heads with their query heads, and in bfloat16 the order is that of float32."""
    example = MODULES["grouped_query_by_hand"]()
    model, (x,) = example.model.eval(), example.args
    graph = depgraph.trace(model, x)
    loss = lambda output, _: output.float().square().mean()  # noqa: E731
    scores = importance.named(name, batches=[x], loss=loss)(graph)
    report = graph.plan(scores, depgraph.Target(params=0.6), scope="axis").apply_with_report()
    assert report.check is not None and report.check.error < 1e-5 and not report.check.vacuous
    halved = copy.deepcopy(model).to(torch.bfloat16)
    found = importance.named(name, batches=[x.bfloat16()], loss=loss)(depgraph.trace(halved, x.bfloat16()))
    for axis_name, expected in scores.items():
        apart = np.abs(found[axis_name] - expected).max()
        assert apart < 0.1 * np.abs(expected).max()


class Gated(nn.Module):
    """A gated MLP (METHODS.md 8, F2)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gated() -> tuple[Gated, list[Any], Any]:
    torch.manual_seed(1)
    batches = [(torch.randn(6, 3), torch.randn(6, 2)) for _ in range(2)]
    return Gated(), batches, lambda output, batch: F.mse_loss(output, batch[1])


ALL = [*SCORES, "taylor", "taylor-vector", "magnitude", "magnitude-l1", "mag-sp"]


@pytest.mark.parametrize("name", ALL)
def test_a_dead_neuron_of_a_gated_mlp_goes_first_and_takes_nothing_along(name: str) -> None:
    model, batches, loss = gated()
    with torch.no_grad():
        for part in (model.gate, model.up):
            part.weight[2] = part.bias[2] = 0
        model.down.weight[:, 2] = 0
    graph = depgraph.trace(model, batches[0][0])
    (one,) = graph.axes
    found = importance.named(name, batches=batches, loss=loss)(graph)[one.name]
    assert found.argmin() == 2 and found[2] == pytest.approx(0, abs=1e-9)
    pruned = graph.cut_plan({one.name: [2]}).apply()
    torch.testing.assert_close(pruned(batches[0][0]), model(batches[0][0]))


@pytest.mark.parametrize("name", ["taylor", "taylor-second", "obd", "gblm-gradient"])
def test_rescaling_a_linear_path_leaves_the_scores(name: str) -> None:
    """METHODS.md 2.1 and 8 F12: W * G of each tensor stays when a row of up is times 7 and its column of down by 7."""
    model, batches, loss = gated()
    graph = depgraph.trace(model, batches[0][0])
    (one,) = graph.axes
    scorer = importance.named(name, batches=batches, loss=loss)
    before = scorer(graph)[one.name]
    with torch.no_grad():
        model.up.weight[1] *= 7
        model.up.bias[1] *= 7
        model.down.weight[:, 1] /= 7
    np.testing.assert_allclose(scorer(graph)[one.name], before, rtol=1e-3)


@pytest.mark.parametrize("name", ["taylor-second", "llm-surgeon"])
def test_only_one_gradient_lives_at_a_time(name: str) -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    parameters = list(example.model.parameters())
    alive: list[int] = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    found = importance.named(name, batches=[example.kwargs])(graph)
    assert set(alive) == {1}
    assert all(np.isfinite(scores).all() and (scores >= 0).all() for scores in found.values())
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("name", [*SCORES, "taylor"])
def test_models_of_inference_mode_are_refused_and_frozen_ones_are_not(name: str) -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    scorer = importance.named(name, batches=batches, loss=loss)
    expected = scorer(graph)["0.weight:0"]
    model.requires_grad_(False)
    np.testing.assert_array_equal(scorer(graph)["0.weight:0"], expected)
    with torch.inference_mode():
        copied = [(x.clone(), y.clone()) for x, y in batches]
        again = importance.named(name, batches=copied, loss=loss)(graph)["0.weight:0"]
        np.testing.assert_allclose(again, expected, rtol=1e-6)
        made = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = depgraph.trace(made, batches[0][0])
    with pytest.raises(ScoreError, match=r"parameter '0.weight' was made under torch.inference_mode"):
        scorer(graph)


def test_batches_are_split_whatever_their_form() -> None:
    tensor = torch.arange(6).reshape(3, 2)
    assert [s.tolist() for s in samples_of(tensor)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    second = samples_of({"x": tensor, "scale": torch.tensor(2.0), "positions": tensor[:1], "mode": "fast"})[1]
    assert second["x"].tolist() == [[2, 3]] and second["mode"] == "fast"
    assert second["scale"].item() == 2 and second["positions"].tolist() == [[0, 1]]
    third = samples_of((tensor, [tensor[:, 0]]))[2]
    assert isinstance(third, tuple) and third[0].tolist() == [[4, 5]] and third[1][0].tolist() == [4]
    assert samples_of(ONE) == [ONE] and sample_count(ONE) == 1 and sample_count({"x": tensor}) == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(4, 5), torch.randn(3, 3)), "leading sizes 3, 4: give batches of one sample each"),
        ((torch.randn(0, 5), torch.randn(0, 3)), "a batch has no samples"),
    ],
)
@pytest.mark.parametrize("name", SCORES)
def test_batches_that_cant_be_split_are_data_errors(name: str, batch: Any, message: str) -> None:
    model, _, loss = regression()
    graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(DataError, match=message):
        importance.named(name, batches=[batch], loss=loss)(graph)
    with pytest.raises(DataError, match="no batches"):
        importance.named(name, batches=[], loss=loss)(graph)


@pytest.mark.parametrize("name", SCORES)
def test_what_is_not_finite_is_named(name: str) -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    with torch.no_grad():
        model[3].weight[1, 2] = float("nan")
    with pytest.raises(ScoreError, match="parameter '3.weight' holds NaN or infinite values"):
        importance.named(name, batches=batches, loss=loss)(graph)
    with torch.no_grad():
        model[3].weight[1, 2] = 0
    with pytest.raises(ScoreError, match="the loss of a batch is nan"):
        importance.named(name, batches=[(torch.full((2, 5), float("nan")), torch.zeros(2, 3))], loss=loss)(graph)


@pytest.mark.parametrize("name", SCORES[:-1])
def test_parameters_that_no_gradient_reaches_are_worth_nothing(name: str) -> None:
    graph = hand_graph(
        Weights(w=[1.0, 2.0], idle=[5.0, 5.0]), axis("a", member("w", 0, [0, 1])), axis("b", member("idle", 0, [0, 1]))
    )
    found = importance.named(name, batches=[ONE], loss=linear_loss(w=[0.3, 0.3]), normalise="none")(graph)
    assert found["b"].tolist() == [0, 0] and found["a"].min() > 0


def test_normalised_scores_do_not_compare_across_axes() -> None:
    assert importance.SecondOrder([]).comparable and not importance.named("obd", batches=[]).comparable
    with pytest.raises(ScoreError, match="did you mean 'second'"):
        importance.SecondOrder([], form="secnd")
    with pytest.raises(ScoreError, match="unknown norm of gradients"):
        importance.GradientNorm([], norm="l3")
