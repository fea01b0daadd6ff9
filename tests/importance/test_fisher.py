"""Second-order scores are the numbers of the formulas, whatever way the samples come in batches."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import DataError, ScoreError
from importance.samples import samples_of
from tests.importance.test_taylor import ONE, G, W, both_dims
from tests.importance.toys import Weights, axis, hand_graph, linear_loss, member, regression
from tests.zoo import ZOO


@pytest.mark.parametrize(("form", "out"), [("second", [8, 18]), ("mix", [4, 9])])
def test_the_numbers_of_the_formulas(form: str, out: list[float]) -> None:
    """METHODS.md 2.1: with F = [[4, 1], [1, 9]], the squares of G, second rows [8, 18] and mix rows [4, 9]."""
    found = importance.Fisher([ONE], linear_loss(w=G), form=form)(both_dims(Weights(w=W)))
    np.testing.assert_allclose(found["out"], out)
    columns = {"second": [4 + 9, 4 + 9], "mix": [7.5, 5.5]}
    np.testing.assert_allclose(found["in"], columns[form])


def test_squares_of_samples_are_averaged_and_not_overwritten() -> None:
    """METHODS.md 2.4: two samples with g = 1 then 3 have F = 5; the gradient of both is 2, so mix is |2 - 5 / 2|."""
    graph = hand_graph(Weights(w=[1.0]), axis("a", member("w", 0, [0])))
    loss = lambda output, batch: output["w"].mean()  # noqa: E731
    for batches in ([torch.tensor([1.0, 3.0])], [torch.tensor([1.0]), torch.tensor([3.0])]):
        assert importance.Fisher(batches, loss)(graph)["a"] == pytest.approx([5])
        assert importance.named("obd", batches=batches, loss=loss)(graph)["a"] == pytest.approx([5])
        assert importance.Fisher(batches, loss, form="mix")(graph)["a"] == pytest.approx([0.5])
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([5.0])]
    assert importance.Fisher(batches, loss, form="mix")(graph)["a"] == pytest.approx([abs(3 - 35 / 3 / 2)])


@pytest.mark.parametrize("form", ["second", "mix"])
def test_scores_of_a_network_are_those_of_its_samples_in_any_batches(form: str) -> None:
    model, batches, loss = regression()
    model.eval()
    graph = depgraph.trace(model, batches[0][0])
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        loss(model(x[i : i + 1]), (None, y[i : i + 1])).backward()
        squares = {n: squares[n] + p.grad**2 / len(x) for n, p in model.named_parameters()}
    model.zero_grad()
    loss(model(x), (None, y)).backward()
    saliency = {
        n: (p**2 * squares[n] if form == "second" else (p * p.grad - p**2 * squares[n] / 2).abs()).detach()
        for n, p in model.named_parameters()
    }
    model.zero_grad()
    expected = saliency["0.weight"].sum(1) + saliency["0.bias"] + saliency["3.weight"].sum(0)
    whole = (x, y)
    for given in ([whole], batches, batches[::-1], list(samples_of(whole))):
        found = importance.Fisher(given, loss, form=form)(graph)["0.weight:0"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_rescaling_a_linear_path_leaves_second_and_dead_units_are_lowest() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    _, batches, loss = regression()
    with torch.no_grad():
        for dead in (model[0].weight[6], model[0].bias[6], model[1].weight[:, 6]):
            dead.zero_()
    graph = depgraph.trace(model, batches[0][0])
    before = importance.Fisher(batches, loss)(graph)["0.weight:0"]
    with torch.no_grad():
        model[0].weight[2] *= 7
        model[0].bias[2] *= 7
        model[1].weight[:, 2] /= 7
    np.testing.assert_allclose(importance.Fisher(batches, loss)(graph)["0.weight:0"], before, rtol=1e-4)
    for form in ("second", "mix"):
        found = importance.Fisher(batches, loss, form=form)(graph)["0.weight:0"]
        assert (found.argmin(), found[6]) == (6, 0)


@pytest.mark.parametrize("form", ["second", "mix"])
def test_a_language_model_with_padding_is_split_into_its_sequences(form: str) -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    one_by_one = list(samples_of(example.kwargs))
    assert len(one_by_one) == len(example.kwargs["input_ids"]) > 1
    found = importance.Fisher([example.kwargs], form=form)(graph)
    alone = importance.Fisher(one_by_one, form="second")(graph)
    for one in graph.axes:
        assert found[one.name].max() > 0
        if form == "second":
            np.testing.assert_allclose(found[one.name], alone[one.name], rtol=1e-4)
    assert not any(p.grad is not None for p in example.model.parameters())


def test_samples_of_tuples_and_dicts_keep_what_has_no_samples() -> None:
    x = torch.arange(6).reshape(3, 2)
    parts = list(samples_of({"x": x, "scale": ONE, "mode": "full", "pair": (x, [x])}))
    assert len(parts) == 3
    assert parts[1]["x"].tolist() == parts[1]["pair"][1][0].tolist() == [[2, 3]]
    assert (parts[1]["scale"], parts[1]["mode"]) == (ONE, "full")
    assert [p["x"].tolist() for p in samples_of(UserDict(x=x))] == [[[0, 1]], [[2, 3]], [[4, 5]]]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([(torch.randn(4, 5), torch.randn(3, 5))], "can't be split into its samples.* 3, 4 long"),
        ([torch.randn(0, 5)], "a batch is empty"),
        (["text"], "a batch is a str"),
        ([torch.randn(4, 9)], "doesn't fit Sequential"),
    ],
)
@pytest.mark.parametrize("form", ["second", "mix"])
def test_batches_that_cant_be_used_are_data_errors(batches: list[Any], message: str, form: str) -> None:
    model, _, _ = regression()
    graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(DataError, match=message):
        importance.Fisher(batches, lambda output, batch: output.sum(), form=form)(graph)


@pytest.mark.parametrize("make", [importance.Taylor, importance.Fisher])
def test_parameters_that_cant_have_gradients_are_named(make: Any) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    graph = hand_graph(model, axis("a", member("0.weight", 0, list(range(8)))))
    with pytest.raises(ScoreError, match="'0.weight' was made in inference mode"):
        make([torch.randn(2, 5)], lambda output, batch: output.sum())(graph)
    model = nn.Sequential(nn.Linear(5, 8))
    model[0].weight = nn.Parameter(torch.ones(8, 5, dtype=torch.int8), requires_grad=False)
    graph = hand_graph(model, axis("a", member("0.weight", 0, list(range(8)))))
    with pytest.raises(ScoreError, match="'0.weight' holds torch.int8"):
        make([torch.randn(2, 5)], lambda output, batch: output.sum())(graph)


def test_weights_that_are_not_finite_are_named() -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    with torch.no_grad():
        model[3].weight[1, 2] = float("nan")
    with pytest.raises(ScoreError, match=r"parameter '3.weight' holds NaN or infinite values"):
        importance.Fisher(batches, loss)(graph)


@pytest.mark.parametrize("name", ["taylor", "taylor-second", "taylor-mix", "gblm", "llm-surgeon", "fisher-obs"])
def test_batches_of_inference_mode_are_taken(name: str) -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    expected = importance.named(name, batches=batches, loss=loss)(graph)["0.weight:0"]
    with torch.inference_mode():
        copied = [(x.clone(), y.clone()) for x, y in batches]
        found = importance.named(name, batches=copied, loss=loss)(graph)["0.weight:0"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_buffers_of_inference_mode_are_named() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    graph = depgraph.trace(model, torch.randn(2, 5))
    with torch.inference_mode():
        model[1].running_mean = torch.zeros(8)
    with pytest.raises(ScoreError, match="buffer '1.running_mean' was made in inference mode"):
        importance.Fisher([torch.randn(2, 5)], lambda output, _: output.sum())(graph)


def test_what_all_samples_share_isnt_split() -> None:
    positions, x = torch.arange(3)[None], torch.randn(4, 3)
    assert [(s["x"].shape, s["positions"].shape) for s in samples_of({"x": x, "positions": positions})] == [
        ((1, 3), (1, 3))
    ] * 4
    assert [s["x"].shape for s in samples_of({"x": x[:1], "positions": positions})] == [(1, 3)]
