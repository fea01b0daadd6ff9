"""First-order Taylor scores are the numbers of the formula, and of a network from its full gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from importance import sums
from tests.importance.toys import Weights, axis, hand_graph, linear_loss, member, regression
from tests.zoo import MODULES, ZOO

W = [[1.0, -2.0], [3.0, 1.0]]
G = [[2.0, 1.0], [-1.0, 3.0]]
ONE = torch.tensor(1.0)


def both_dims(model: nn.Module) -> Any:
    return hand_graph(model, axis("out", member("w", 0, [0, 1])), axis("in", member("w", 1, [0, 1])))


@pytest.mark.parametrize(("form", "out", "into"), [("element", [4, 6], [5, 5]), ("vector", [0, 0], [1, 1])])
@pytest.mark.parametrize("accumulate", ["abs", "signed"])
def test_the_numbers_of_the_formula(form: str, accumulate: str, out: list[float], into: list[float]) -> None:
    """METHODS.md 2.1: out-channel first [4, 6], vector [0, 0]; in-channel first [5, 5], vector [1, 1]."""
    scorer = importance.Taylor([ONE], linear_loss(w=G), form=form, accumulate=accumulate)
    found = scorer(both_dims(Weights(w=W)))
    np.testing.assert_allclose(found["out"], out)
    np.testing.assert_allclose(found["in"], into)


def test_grouped_query_units_are_summed_contiguously() -> None:
    """METHODS.md 2.1: q scores [1, 2, 10, 20] on two KV heads give [3, 30]; k, v and the columns of o are added."""
    model = Weights(q=[[1.0], [2.0], [10.0], [20.0]], k=[[1.0], [1.0]], o=[[1.0, 1.0, 1.0, 1.0]])
    queries = member("q", 0, [0, 0, 1, 1])
    units = axis("units", queries, member("k", 0, [0, 1]), member("o", 1, [0, 0, 1, 1]))
    graph = hand_graph(model, axis("q", queries), units)
    loss = linear_loss(q=[[1.0]] * 4, k=[[100.0], [200.0]], o=[[-7.0, 1.0, 2.0, 3.0]])
    found = importance.Taylor([ONE], loss)(graph)
    np.testing.assert_allclose(found["q"], [3, 30])
    np.testing.assert_allclose(found["units"], [3 + 100 + 8, 30 + 200 + 5])
    first = importance.Taylor([ONE], loss, reduction="first", normalise="sum")(graph)
    np.testing.assert_allclose(first["units"], [3 / 33, 30 / 33])


def test_batches_are_added_after_or_before_the_absolute_value() -> None:
    batches = [torch.tensor(1.0), torch.tensor(-3.0)]
    for accumulate, factor in (("abs", 4), ("signed", 2)):
        found = importance.Taylor(batches, linear_loss(w=G), accumulate=accumulate)(both_dims(Weights(w=W)))
        np.testing.assert_allclose(found["out"], [4 * factor, 6 * factor])


def expected_scores(graph: depgraph.DependencyGraph, losses: list[Callable[[], Tensor]]) -> dict[str, np.ndarray]:
    """Group by group from full gradients; tied names once."""
    tensors = graph.tensors()
    total = {one.name: np.zeros(one.size) for one in graph.axes}
    for loss in losses:
        graph.model.zero_grad()
        loss().backward()
        saliency = {name: (t * t.grad).abs().detach() for name, t in tensors.items() if t.grad is not None}
        for one in graph.axes:
            for number in range(one.size):
                parts = {(id(tensors[t]), d): (t, i) for t, d, i in one.group(number).members if t in saliency}
                for (_, d), (target, indices) in parts.items():
                    total[one.name][number] += float(saliency[target].index_select(d, torch.as_tensor(indices)).sum())
    graph.model.zero_grad()
    return total


def test_scores_of_a_network_from_its_full_gradients() -> None:
    model, batches, loss = regression()
    model.eval()
    graph = depgraph.trace(model, batches[0][0])
    expected = expected_scores(graph, [lambda b=batch: loss(model(b[0]), b) for batch in batches])
    model.train()
    found = importance.Taylor(batches, loss)(graph)
    np.testing.assert_allclose(found["0.weight:0"], expected["0.weight:0"], rtol=1e-5)
    turned = importance.Taylor(batches[::-1], loss)(graph)
    np.testing.assert_allclose(turned["0.weight:0"], found["0.weight:0"], rtol=1e-12)


def next_token_by_hand(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    picked = []
    for row in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            if mask[row, t] and mask[row, t + 1]:
                picked.append(-torch.log_softmax(logits[row, t], -1)[ids[row, t + 1]])
    return torch.stack(picked).mean()


@pytest.mark.parametrize("name", ["llama_8_2", "gpt2"])
def test_a_language_model_has_next_token_loss_without_its_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PIECE", {"cpu": 300})
    example = ZOO[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    ids, mask = example.kwargs["input_ids"], example.kwargs["attention_mask"]
    assert not mask.all()
    found = importance.Taylor([example.kwargs])(graph)
    expected = expected_scores(graph, [lambda: next_token_by_hand(example.model(**example.kwargs).logits, ids, mask)])
    for one in graph.axes:
        np.testing.assert_allclose(found[one.name], expected[one.name], rtol=1e-4, atol=1e-7)
        assert found[one.name].max() > 0


def test_labels_give_the_models_own_loss() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    labels = torch.randint(3, 50, example.kwargs["input_ids"].shape)
    batch = {**example.kwargs, "labels": labels}
    expected = expected_scores(graph, [lambda: example.model(**batch).loss])
    found = importance.Taylor([batch])(graph)
    for one in graph.axes:
        np.testing.assert_allclose(found[one.name], expected[one.name], rtol=1e-4, atol=1e-7)


def test_a_hand_written_language_model_needs_no_loss_and_its_tied_weights_count_once() -> None:
    example = MODULES["tied_weights"]()
    (ids,) = example.args
    graph = depgraph.trace(example.model, example.args)
    everything = torch.ones_like(ids)
    expected = expected_scores(graph, [lambda: next_token_by_hand(example.model(ids), ids, everything)])
    for batch in (ids, (ids,), {"ids": ids}, {"ids": ids, "labels": ids}):
        found = importance.Taylor([batch])(graph)
        for one in graph.axes:
            np.testing.assert_allclose(found[one.name], expected[one.name], rtol=1e-4, atol=1e-7)


def test_an_encoder_decoder_is_scored_by_its_target_tokens() -> None:
    example = ZOO["t5"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    ids = example.kwargs["decoder_input_ids"]
    loss = lambda: next_token_by_hand(example.model(**example.kwargs).logits, ids, torch.ones_like(ids))  # noqa: E731
    expected = expected_scores(graph, [loss])
    found = importance.Taylor([example.kwargs])(graph)
    for one in graph.axes:
        np.testing.assert_allclose(found[one.name], expected[one.name], rtol=1e-4, atol=1e-7)


def test_scores_follow_the_units_when_these_are_permuted() -> None:
    model, batches, loss = regression()
    order = torch.randperm(8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[3].weight.copy_(model[3].weight[:, order])
    graphs = [depgraph.trace(m, batches[0][0]) for m in (model, other)]
    for form in ("element", "vector"):
        found = [importance.Taylor(batches, loss, form=form)(graph)["0.weight:0"] for graph in graphs]
        np.testing.assert_allclose(found[1], found[0][order.numpy()], rtol=1e-4, atol=1e-7)


def test_a_dead_unit_is_lowest() -> None:
    model, batches, loss = regression()
    with torch.no_grad():
        for dead in (model[0].weight[6], model[0].bias[6], model[3].weight[:, 6]):
            dead.zero_()
    found = importance.Taylor(batches, loss)(depgraph.trace(model, batches[0][0]))["0.weight:0"]
    assert found.argmin() == 6
    assert found[6] == 0


def test_rescaling_a_linear_path_leaves_the_scores() -> None:
    """METHODS.md 2.1: W * G of each tensor stays when a row is multiplied by c and its column divided by c."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    _, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    before = importance.Taylor(batches, loss)(graph)["0.weight:0"]
    with torch.no_grad():
        model[0].weight[2] *= 7
        model[0].bias[2] *= 7
        model[1].weight[:, 2] /= 7
    np.testing.assert_allclose(importance.Taylor(batches, loss)(graph)["0.weight:0"], before, rtol=1e-4)


def test_a_batch_counts_by_its_samples() -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    small = (batches[1][0][:2], batches[1][1][:2])
    alone = [importance.Taylor([batch], loss)(graph)["0.weight:0"] for batch in (batches[0], small)]
    found = importance.Taylor([batches[0], small], loss)(graph)["0.weight:0"]
    np.testing.assert_allclose(found, alone[0] + alone[1] / 2, rtol=1e-6)
    x, y = (torch.cat([batch[k] for batch in batches]) for k in range(2))
    divided = ([(x, y)], [(x[:8], y[:8]), (x[8:], y[8:])])
    whole, parts = (
        importance.Taylor(b, loss, accumulate="signed", normalise="sum")(graph)["0.weight:0"] for b in divided
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
