"""Activation criteria: the numbers of METHODS.md by hand, and what must hold for all of them on any model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import DataError, ScoreError
from importance import CRITERIA, Activation, Gathering, Norms, collect
from importance.accumulators import Absolutes, Gram, Moments, MomentSums, SampleMeans, Weights
from importance.rows import Rows
from importance.weight_shares import WeightShares
from tests.zoo import MODULES, ZOO

FIRST, SECOND = [1.0, 0.0, 2.0, 1.0], [3.0, 0.0, 0.0, 1.0]
ONE_SEQUENCE = torch.tensor([[FIRST, SECOND]])
TWO_SEQUENCES = torch.tensor([[FIRST], [SECOND]])


class TwoHeads(nn.Module):
    """The output projection of METHODS.md 2.2, with two heads of two channels in front of it."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(heads, 1))
        self.out = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.value.weight.copy_(torch.eye(4))
            self.out.weight.copy_(torch.tensor([[1.0, 2, 0, 1], [0, -1, 3, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x)
        heads = value.reshape(*value.shape[:-1], self.heads, -1) * self.scale
        return self.out(heads.reshape(*value.shape))


def heads_of(criterion: Any, x: Tensor, heads: int = 2) -> np.ndarray:
    model = TwoHeads(heads)
    graph = depgraph.trace(model, x)
    axis = next(a for a in graph.axes if a.size == heads and any(m.target == "scale" for m in a.members))
    return Activation([x], criterion)(graph)[axis.name]


@pytest.mark.parametrize(
    ("criterion", "x", "expected"),
    [
        ("wanda-sp", ONE_SEQUENCE, [1.581139, 4.414214]),
        ("amp", ONE_SEQUENCE, [2, 5]),
        ("minitron", ONE_SEQUENCE, [2, 1.414214]),
        ("wifv", TWO_SEQUENCES, [2, 18]),
        ("ifv", TWO_SEQUENCES, [2, 2]),
        ("activation", ONE_SEQUENCE, [10**0.5, 2 + 2**0.5]),
    ],
)
def test_two_heads_score_as_computed_by_hand(criterion: str, x: Tensor, expected: list[float]) -> None:
    assert heads_of(criterion, x) == pytest.approx(expected, abs=1e-6)


def test_criteria_name_different_winners_on_one_toy() -> None:
    """METHODS.md 3: WIFV, Wanda-sp and AMP take head 0, Minitron head 1."""
    goes = {name: int(np.argmin(heads_of(name, ONE_SEQUENCE))) for name in ("wanda-sp", "wifv", "amp", "minitron")}
    assert goes == {"wanda-sp": 0, "wifv": 0, "amp": 0, "minitron": 1}


def test_the_weighted_norm_of_two_sequences() -> None:
    """METHODS.md 8 F1: WIFN per channel, squared and summed per head, is [1.25, 5.5]."""
    channels = heads_of("wifn", TWO_SEQUENCES, heads=4)
    assert [(channels[:2] ** 2).sum(), (channels[2:] ** 2).sum()] == pytest.approx([1.25, 5.5])


def test_neurons_of_amp_are_the_mean_of_their_size() -> None:
    assert heads_of("amp", ONE_SEQUENCE, heads=4) == pytest.approx([2, 0, 1, 1])


def test_two_batches_of_one_score_give_it_times_the_root_of_two() -> None:
    model = TwoHeads()
    graph = depgraph.trace(model, ONE_SEQUENCE)
    once, twice = (Activation([ONE_SEQUENCE] * n, "minitron")(graph) for n in (1, 2))
    for name, scores in once.items():
        assert twice[name] == pytest.approx(scores * 2**0.5)


def test_relative_importance_by_hand() -> None:
    """METHODS.md 2.18: the columns of [[.583333, 2.7], [1.166667, 1.8]] summed."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([[1.0, 3], [2, 2]]))
    x = torch.tensor([[1.0, 4.0]])
    graph = depgraph.trace(model, x)
    assert Activation([x], "ria")(graph)["0.weight:0"] == pytest.approx([1.75, 4.5], abs=1e-5)


class Net(nn.Module):
    """A gated MLP between two linear maps, with room for dead, doubled and constant neurons."""

    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.gate, self.up = nn.Linear(8, inner), nn.Linear(8, inner)
        self.down = nn.Linear(inner, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        return self.head(h + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h)))


def _net(seed: int = 0) -> tuple[Net, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(), [torch.randn(3, 4, 5) for _ in range(3)]


NEURONS = "gate.weight:0"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_dead_unit_goes_first(criterion: str) -> None:
    model, batches = _net()
    with torch.no_grad():
        for p in (model.gate.weight, model.gate.bias, model.up.weight, model.up.bias):
            p[2] = 0
        model.down.weight[:, 2] = 0
    graph = depgraph.trace(model, batches[0])
    assert int(np.argmin(Activation(batches, criterion)(graph)[NEURONS])) == 2


@pytest.mark.parametrize("criterion", CRITERIA)
def test_permuting_units_permutes_scores(criterion: str) -> None:
    model, batches = _net()
    before = Activation(batches, criterion)(depgraph.trace(model, batches[0]))[NEURONS]
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight.copy_(layer.weight[order].clone())
            layer.bias.copy_(layer.bias[order].clone())
        model.down.weight.copy_(model.down.weight[:, order].clone())
    after = Activation(batches, criterion)(depgraph.trace(model, batches[0]))[NEURONS]
    assert after == pytest.approx(before[order.numpy()], rel=1e-5)


@pytest.mark.parametrize(
    "statistic",
    [
        Moments(),
        Norms(),
        Absolutes(),
        SampleMeans(),
        SampleMeans("var", "mean"),
        Gram(),
        *map(Weights, ("absolute", "square")),
        WeightShares(),
    ],
)
def test_statistics_are_the_same_in_any_batches_and_order(statistic: Any) -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    ways = [batches, batches[::-1], [torch.cat(batches)], list(torch.cat(batches).split(2))]
    found = [collect(graph, way, [statistic], Gathering(dtype=torch.float64)) for way in ways]
    for consumer in found[0].consumers:
        first, *others = (vars(way.of(consumer, statistic)) for way in found)
        for other in others:
            for name, value in first.items():
                if isinstance(value, Tensor):
                    assert torch.allclose(value, other[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("columns", [3, 40, 200])
@pytest.mark.parametrize("positions", [1, 7, 700])
@pytest.mark.parametrize("text", [False, True])
def test_sums_of_rows_are_those_of_their_tensor_however_it_lies_in_memory(
    columns: int, positions: int, text: bool
) -> None:
    values = torch.randn(4, positions, columns, generator=torch.Generator().manual_seed(0)) + 2
    mask = torch.arange(4 * positions).reshape(4, positions) % 3 > 0 if text else None
    flat = (values.flatten(0, 1) if mask is None else values[mask]).double()
    apart = (flat - flat.mean(0)).square().sum(0)
    for given in (values, values.mT.contiguous().mT):
        rows, sums = Rows(given, mask), MomentSums()
        sums.add(rows)
        assert rows.count == sums.count == len(flat)
        for found, expected in ((rows.squares, flat.square()), (rows.absolutes, flat.abs()), (rows.total, flat)):
            assert torch.allclose(found.double(), expected.sum(0), rtol=1e-5, atol=1e-3)
        assert torch.allclose(sums.mean.double(), flat.mean(0), rtol=1e-5, atol=1e-6)
        assert torch.allclose(sums.squares.double(), apart, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_tensors_that_came_in() -> None:
    model, batches = _net()
    seen: list[Tensor] = []
    model.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    rows = torch.cat(seen).reshape(-1, 6).double()
    graph = depgraph.trace(model, batches[0])
    found = collect(graph, batches, [Moments(), Norms(), Gram()])
    consumer = next(c for c in found.consumers if c.weight == "down.weight")
    moments, norms = found.of(consumer, Moments()), found.of(consumer, Norms())
    assert moments.count == norms.rows == len(rows) and norms.samples == 9
    assert torch.allclose(moments.mean.double(), rows.mean(0), atol=1e-6)
    assert torch.allclose(moments.variance.double(), rows.var(0), atol=1e-6)
    assert torch.allclose(norms.squares.double(), rows.square().sum(0), atol=1e-5)
    assert torch.allclose(found.of(consumer, Gram()).gram.double(), rows.T @ rows, atol=1e-5)


def test_padding_does_not_count() -> None:
    example = ZOO["llama_8_4"]()
    tokens = example.kwargs["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    other = tokens.clone()
    other[:, :3] = 1
    graph = depgraph.trace(example.model, (), {"input_ids": tokens, "attention_mask": mask})
    first, second = (collect(graph, [{"input_ids": ids, "attention_mask": mask}], [Norms()]) for ids in (tokens, other))
    heads = {bool(c.weight): first.of(c, Norms()).rows / int(mask.sum()) for c in first.consumers}
    assert heads[True] == 1 and heads[False] in (8, 4), "each head has rows of its own where queries meet keys"
    for consumer in first.consumers:
        here, there = first.of(consumer, Norms()), second.of(consumer, Norms())
        assert torch.allclose(here.squares, there.squares, rtol=1e-4, atol=1e-5)


def test_channels_that_are_summed_by_themselves_are_multiplied_with_nothing() -> None:
    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 15), nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x)
            return self.down(hidden) + hidden.sum() + torch.einsum("nc,k->n", hidden, x[0])[:, None]

    graph = depgraph.trace(Reduced().eval(), torch.randn(2, 4))
    assert [c.weight for c in importance.consumers_of(graph)] == ["down.weight"]


def test_batches_of_other_shapes_count_like_those_of_the_example() -> None:
    example = ZOO["llama_8_4"]()
    tokens = example.kwargs["input_ids"]
    graph = depgraph.trace(example.model, (), example.kwargs)
    ragged = [{"input_ids": tokens[:, :4]}, {"input_ids": tokens[:1]}, {"input_ids": tokens[1:2, :3]}]
    found = collect(graph, ragged, [Norms()])
    rows = {found.of(c, Norms()).rows for c in found.consumers if c.weight}
    assert rows == {tokens.shape[0] * 4 + tokens.shape[1] + 3}


def test_a_model_is_captured_once_for_each_shape_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = depgraph.trace(TwoHeads().eval(), ONE_SEQUENCE)
    batches = [torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.randn(2, 2, 4), ONE_SEQUENCE]
    first = collect(graph, batches, [Norms()])
    monkeypatch.setattr("depgraph.observing.record", lambda *_: pytest.fail("captured again"))
    again = collect(graph, batches, [Norms()])
    for consumer in first.consumers:
        assert torch.equal(first.of(consumer, Norms()).squares, again.of(consumer, Norms()).squares)


@pytest.mark.parametrize("name", ["resnet_basic", "vit", "swin", "mixtral", "mamba", "t5"])
def test_every_criterion_scores_every_group_and_its_plan_is_cut_right(name: str) -> None:
    example = ZOO[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    found = collect(graph, [example.kwargs or example.args], [Activation([()], c) for c in CRITERIA])
    for criterion in CRITERIA:
        scores = Activation(found, criterion)(graph)
        assert all(np.isfinite(scores[a.name]).all() and scores[a.name].shape == (a.size,) for a in graph.axes)
    report = graph.plan(scores, depgraph.Target(params=0.8), scope="axis").apply_with_report()
    assert report.check is not None and report.check.error <= report.check.tolerance


def test_the_model_is_left_as_it_was() -> None:
    example = MODULES["residual_cnn"]()
    example.model.train()
    before = {name: tensor.clone() for name, tensor in example.model.state_dict().items()}
    graph = depgraph.trace(example.model, example.args)
    Activation([example.args])(graph)
    assert example.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in example.model.state_dict().items())


def test_bad_data_is_refused_with_a_reason() -> None:
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    with pytest.raises(DataError, match="no batches"):
        Activation([])(graph)
    with pytest.raises(DataError, match="doesn't fit Net"):
        Activation([torch.randn(2, 7)])(graph)
    with pytest.raises(DataError, match="batches is a Tensor"):
        Activation(batches[0])
    with pytest.raises(ScoreError, match=r"unknown criterion 'wanda'.*wanda-sp"):
        Activation(batches, "wanda")
    with pytest.raises(ScoreError, match=r"NaN or infinity comes in at the input of gate.weight"):
        Activation([torch.full((1, 2, 5), torch.nan)])(graph)
    found = collect(graph, batches, [Norms()])
    with pytest.raises(ScoreError, match=r"Moments.* of the input of gate.weight.* was not collected"):
        importance.Activation(found, "ifv")(graph)


def test_token_ids_of_another_tokenizer_are_refused() -> None:
    example = ZOO["llama_8_4"]()
    graph = depgraph.trace(example.model, (), example.kwargs)
    tokens = example.kwargs["input_ids"].clone()
    tokens[0, 0] = 100_000
    with pytest.raises(DataError, match=r"'input_ids' of a batch holds the index 100000.*rows: look for a tokenizer"):
        Activation([{"input_ids": tokens}])(graph)
