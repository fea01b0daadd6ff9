"""Magnitude and random scores."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import ScoreError
from depgraph.scoring import checked_scores
from importance import sums
from tests.importance.toys import Weights, axis, hand_graph, member
from tests.zoo import MODULES, ZOO

W_O = [[1.0, 2.0, 0.0, 1.0], [0.0, -1.0, 3.0, 1.0]]
RAW = {"reduction": "sum", "normalise": "none"}


@pytest.mark.parametrize(
    ("p", "columns", "heads"),
    [(2, [1, 5, 9, 2], [6, 11]), (1, [1, 3, 3, 2], [4, 5]), (3, [1, 9, 27, 2], [10, 29])],
)
def test_powers_are_summed_without_a_root(p: float, columns: list[float], heads: list[float]) -> None:
    """METHODS.md 2.2: the squared norms of the columns are [1, 5, 9, 2]."""
    model = Weights(o=W_O)
    graph = hand_graph(
        model, axis("columns", member("o", 1, [0, 1, 2, 3])), axis("heads", member("o", 1, [0, 0, 1, 1]))
    )
    found = importance.Magnitude(p, **RAW)(graph)
    np.testing.assert_allclose(found["columns"], columns)
    np.testing.assert_allclose(found["heads"], heads)


def test_members_are_averaged_and_axes_divided_by_their_mean() -> None:
    model = Weights(o=W_O, scale=[3.0, 1.0, 1.0, 0.0])
    graph = hand_graph(model, axis("columns", member("o", 1, [0, 1, 2, 3]), member("scale", 0, [0, 1, 2, 3])))
    expected = np.array([(1 + 9) / 2, (5 + 1) / 2, (9 + 1) / 2, (2 + 0) / 2])
    np.testing.assert_allclose(importance.Magnitude()(graph)["columns"], expected / expected.mean())


def test_one_tensor_times_c_counts_its_term_times_c_to_the_p() -> None:
    columns = [0, 1, 2, 3]
    axes = axis("columns", member("o", 1, columns), member("scale", 0, columns))
    scaled = Weights(o=W_O, scale=[6.0, 2.0, 2.0, 0.0])
    found = importance.Magnitude(3, reduction="sum", normalise="none")(hand_graph(scaled, axes))["columns"]
    np.testing.assert_allclose(found, [1 + 8 * 27, 9 + 8, 27 + 8, 2])


@pytest.mark.parametrize("scorer", [importance.Magnitude(), importance.Random(0)])
def test_plans_take_the_same_share_of_every_axis(scorer: importance.Magnitude | importance.Random) -> None:
    """The first layer's rows differ far more than the second's, which says nothing about what either is worth."""
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(0.1, 10, 40)[:, None])
    graph = depgraph.trace(model.eval(), torch.randn(2, 6))
    removal = graph.plan(scorer, depgraph.Target(params=0.7)).removal
    shares = [len(removal[axis.name]) / axis.size for axis in graph.axes]
    assert shares[0] == pytest.approx(shares[1], abs=1 / 20)


def test_buffers_have_no_score() -> None:
    model = Weights(o=W_O)
    model.register_buffer("statistics", torch.full((4,), 100.0))
    columns = [0, 1, 2, 3]
    graph = hand_graph(model, axis("columns", member("statistics", 0, columns, "buffer"), member("o", 1, columns)))
    np.testing.assert_allclose(importance.Magnitude(**RAW)(graph)["columns"], [1, 5, 9, 2])


def test_kernels_are_summed_over_all_their_other_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch.randn(4, 3, 5, 2)
    graph = hand_graph(
        Weights(k=kernel.tolist()),
        *(axis(f"dim {d}", member("k", d, list(range(size)))) for d, size in enumerate(kernel.shape)),
    )
    for piece in (1, 50, 1000):
        monkeypatch.setattr(sums, "PIECE", {"cpu": piece})
        found = importance.Magnitude(1, **RAW)(graph)
        for d in range(4):
            np.testing.assert_allclose(found[f"dim {d}"], kernel.abs().transpose(0, d).flatten(1).sum(1), rtol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_stacked_weights_are_read_as_they_lie(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PIECE", {"cpu": 100})
    experts, read = torch.randn(6, 30, 40).permute(order), []

    def seen(piece: torch.Tensor) -> torch.Tensor:
        read.append(piece)
        return piece.abs()

    found = sums.index_sums(seen, (experts,), (0, 2))
    assert torch.allclose(found[2], experts.abs().sum((0, 1)).double(), rtol=1e-5)
    assert len(read) == 6 * 15  # two rows of 40 at a time
    assert all(40 in piece.shape for piece in read)


def naive(graph: depgraph.DependencyGraph, p: float) -> dict[str, np.ndarray]:
    """Group by group, from the definition; tied names once."""
    tensors = graph.tensors()
    scores = {}
    for one in graph.axes:
        scores[one.name] = np.zeros(one.size)
        for number in range(one.size):
            seen = set()
            for target, dim, indices in one.group(number).members:
                key = (id(tensors[target]), dim)
                if not isinstance(tensors[target], nn.Parameter) or key in seen:
                    continue
                seen.add(key)
                rows = tensors[target].detach().double().index_select(dim, torch.as_tensor(indices))
                scores[one.name][number] += float(rows.abs().pow(p).sum())
    return scores


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("name", ["tied_weights", "grouped_query_by_hand", "dense_net", "residual_cnn", "llama_8_2"])
def test_scores_are_those_of_the_definition(name: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PIECE", {"cpu": 300})
    example = (MODULES | ZOO)[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    found = importance.Magnitude(p, **RAW)(graph)
    expected = naive(graph, p)
    assert graph.axes
    assert found.keys() == expected.keys()
    for one in graph.axes:
        assert found[one.name].dtype == np.float64
        np.testing.assert_allclose(found[one.name], expected[one.name], rtol=1e-5)


def test_tied_weights_count_once() -> None:
    example = MODULES["tied_weights"]()
    model = example.model
    graph = depgraph.trace(model, example.args)
    (hidden,) = (one for one in graph.axes if one.size == 36)
    assert {"embed.weight", "output.weight"} <= {m.target for m in hidden.members}
    squares = [model.embed.weight.square().sum(0), model.encode.weight.square().sum(0), model.shift.square()]
    found = importance.Magnitude(**RAW)(graph)[hidden.name]
    np.testing.assert_allclose(found, sum(squares).detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32_or_wider(dtype: torch.dtype) -> None:
    model = Weights(o=W_O)
    model.o = nn.Parameter(torch.full((3000, 2), 0.01, dtype=dtype))
    graph = hand_graph(model, axis("columns", member("o", 1, [0, 1])))
    exact = 3000 * float(torch.tensor(0.01, dtype=dtype)) ** 2
    np.testing.assert_allclose(importance.Magnitude(**RAW)(graph)["columns"], [exact, exact], rtol=1e-5)


@pytest.mark.parametrize("scorer", [importance.Magnitude(), importance.Magnitude(1, "max", "gaussian")])
def test_scores_follow_the_units_when_these_are_permuted(scorer: importance.Magnitude) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    order = torch.randperm(8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    found = [scorer(depgraph.trace(m, torch.randn(2, 5)))["0.weight:0"] for m in (model, other)]
    np.testing.assert_allclose(found[1], found[0][order.numpy()], rtol=1e-6)


def test_a_dead_unit_is_lowest() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for dead in (model[0].weight[6], model[0].bias[6], model[2].weight[:, 6]):
            dead.zero_()
    assert importance.Magnitude()(depgraph.trace(model, torch.randn(2, 5)))["0.weight:0"].argmin() == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    model = Weights(o=W_O, other=[1.0, 2.0])
    with torch.no_grad():
        model.o[1, 2] = bad
    graph = hand_graph(model, axis("a", member("other", 0, [0, 1])), axis("b", member("o", 1, [0, 0, 1, 1])))
    with pytest.raises(ScoreError, match="parameter 'o' .* holds NaN or infinite values"):
        importance.Magnitude()(graph)


def test_weights_without_values_and_stale_graphs_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
        graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(ScoreError, match="'0.weight' .*meta device"):
        importance.Magnitude()(graph)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    graph = depgraph.trace(model, torch.randn(2, 5))
    model[0].weight = nn.Parameter(torch.randn(6, 5))
    with pytest.raises(ScoreError, match="'0.weight' .*trace the model again"):
        importance.Magnitude()(graph)


@pytest.mark.parametrize("p", [0, -1, float("nan"), float("inf")])
def test_the_power_must_be_above_zero(p: float) -> None:
    with pytest.raises(ScoreError, match="power p"):
        importance.Magnitude(p)


def test_random_scores_depend_on_seed_and_axis_alone() -> None:
    example = MODULES["grouped_query_by_hand"]()
    graph = depgraph.trace(example.model, example.args)
    found = importance.Random(3)(graph)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    turned = importance.Random(3)(hand_graph(example.model, *graph.axes[::-1]))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    other = importance.Random(4)(graph)
    assert len(graph.axes) > 2
    for one in graph.axes:
        assert found[one.name].shape == (one.size,)
        np.testing.assert_array_equal(found[one.name], turned[one.name])
        assert not np.array_equal(found[one.name], other[one.name])
        assert ((found[one.name] >= 0) & (found[one.name] < 1)).all()
    everything = np.concatenate(list(found.values()))
    assert len(np.unique(everything)) == len(everything)


@pytest.mark.parametrize("scorer", [importance.Random(1), importance.Magnitude()])
def test_scores_pass_the_check_of_depgraph(scorer: importance.Magnitude | importance.Random) -> None:
    example = MODULES["multihead_attention"]()
    graph = depgraph.trace(example.model, example.args)
    assert graph.axes
    assert checked_scores(graph, scorer).keys() == {one.name for one in graph.axes}
