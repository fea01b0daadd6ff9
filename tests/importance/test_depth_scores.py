"""Scores of blocks and branches: numbers by hand, and a block that does nothing goes first by every method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from depgraph.errors import DataError, ScoreError
from importance import depth
from importance.depth.angular import angle

from .stacks import decoder, taught, texts, traced, untaught

LOSS = depth.LossMetric(untaught)
IDLE = 3
SCORES: dict[str, Callable[[list[Any], str], depth.DepthScorer]] = {
    "block influence": lambda batches, of: depth.BlockInfluence(batches, of),
    "perplexity": lambda batches, of: depth.Perplexity(batches, of, untaught),
    "loss without": lambda batches, of: depth.Without(batches, of, LOSS),
    "magnitude": lambda batches, of: depth.DepthMagnitude(of=of),
    "taylor": lambda batches, of: depth.DepthTaylor(batches, untaught, of=of),
    "output shift": lambda batches, of: depth.OutputShift(batches, of),
}


@pytest.mark.parametrize("name", SCORES)
def test_what_does_nothing_goes_first_by(name: str) -> None:
    model = decoder(6, identity=IDLE)
    graph, batches = traced(model), taught(model)
    found = SCORES[name](batches, "blocks")(graph)
    assert list(found) == [f"layers.{k}" for k in range(6)]
    assert min(found, key=found.__getitem__) == f"layers.{IDLE}"
    assert depth.OneShot(found)(graph, 1).names == (f"layers.{IDLE}",)
    of_branches = SCORES[name](batches, "branches")(graph)
    for part in ("attention", "mlp"):
        alike = {name: score for name, score in of_branches.items() if name.endswith(part)}
        assert min(alike, key=alike.__getitem__) == f"layers.{IDLE}.{part}"


@pytest.mark.parametrize(
    "make",
    [
        lambda batches: depth.Sleb(batches, metric=LOSS),
        lambda batches: depth.Sleb(batches, "single", metric=LOSS),
        lambda batches: depth.Sleb(batches, "similarity"),
        lambda batches: depth.FinerCut(batches, of="blocks"),
        lambda batches: depth.PairSearch(batches, metric=LOSS),
        lambda batches: depth.Exhaustive(batches, metric=LOSS),
        lambda batches: depth.AngularDrop(batches),
    ],
)
def test_what_does_nothing_is_the_first_that_a_search_removes(make: Callable[[list[Any]], depth.Search]) -> None:
    model = decoder(6, identity=IDLE)
    graph, batches = traced(model), taught(model)
    assert make(batches)(graph, 1).names == (f"layers.{IDLE}",)
    assert len(set(make(batches)(graph, 2).names)) == 2


def test_leaving_out_what_does_nothing_changes_nothing() -> None:
    model = decoder(5, identity=2)
    graph, batches = traced(model), taught(model)
    order = depth.FinerCut(batches)(graph, 2)
    assert set(order.names) == {"layers.2.attention", "layers.2.mlp"}
    assert [step.value for step in order.steps] == [0, 0]
    dense = depth.Engine(graph, batches, ["layers.2"], LOSS).value(())
    assert depth.Perplexity(batches, loss=untaught)(graph)["layers.2"] == pytest.approx(math.exp(dense), abs=1e-12)
    assert depth.OutputShift(batches, "blocks")(graph)["layers.2"] == 0
    assert depth.BlockInfluence(batches)(graph)["layers.2"] == pytest.approx(0, abs=1e-7)
    assert depth.AngularSpan(batches)(graph)["layers.2"] == pytest.approx(0, abs=1e-7)


class Turning(nn.Module):
    """Blocks that add a linear map of what they are given."""

    class Block(nn.Module):
        def __init__(self, weight: list[list[float]]) -> None:
            super().__init__()
            self.map = nn.Linear(2, 2, bias=False)
            self.map.weight.data = torch.tensor(weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.map(x)

    def __init__(self, *weights: list[list[float]]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[self.Block(weight) for weight in weights])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.blocks(x)


ADDS_A_RIGHT_ANGLE = [[0.0, -1.0], [1.0, 0.0]]  # (1, 0) -> (1, 1)
TRIPLES = [[2.0, 0.0], [0.0, 2.0]]


def test_block_influence_and_angles_by_hand() -> None:
    x = torch.tensor([[[0.0, 5.0], [1.0, 0.0]]])
    graph = traced(Turning(ADDS_A_RIGHT_ANGLE, TRIPLES, ADDS_A_RIGHT_ANGLE), x)
    influence = depth.BlockInfluence([x])(graph)
    assert influence == pytest.approx({"blocks.0": 0.292893, "blocks.1": 0, "blocks.2": 0.292893}, abs=1e-6)
    assert depth.AngularSpan([x])(graph) == pytest.approx({"blocks.0": 0.25, "blocks.1": 0, "blocks.2": 0.25}, abs=1e-6)
    spans = depth.AngularSpan([x], 2)(graph)
    assert spans == pytest.approx({"blocks.0": 0.25, "blocks.1": 0.25}, abs=1e-6)
    assert depth.AngularSpan([x], 3)(graph) == pytest.approx({"blocks.0": 0.5}, abs=1e-6)
    assert depth.BeforeLast()(graph, 2).names == ("blocks.0", "blocks.1")


def test_angles_of_vectors() -> None:
    a = torch.tensor([1.0, 0.0]).double()
    others = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [3.0, 3.0], [2.0, 0.0]]).double()
    assert angle(a.expand(4, 2), others).tolist() == pytest.approx([0.5, 1, 0.25, 0], abs=1e-7)


def test_what_is_padding_counts_nothing() -> None:
    turned = [[0.0, 0.0], [1.0, 0.0]]  # adds to the second what the first is
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    batch = {"x": x, "attention_mask": torch.tensor([[1, 0], [1, 1]])}
    graph = traced(Turning(turned), x)
    influence = depth.BlockInfluence([batch])(graph)["blocks.0"]
    assert influence == pytest.approx(2 * 0.292893 / 3, abs=1e-6)  # three tokens that aren't padding
    assert depth.AngularSpan([batch])(graph)["blocks.0"] == pytest.approx((0.25 + 0) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("js", 0.101749 / 2), ("js-reversed", 0.058987), ("norm", 0.0), ("angular", 0.0), ("kl", 0.368064 / 2)],
)
def test_distances_of_two_distributions_by_hand(name: str, wanted: float) -> None:
    dense, cut = torch.tensor([[[0.9, 0.1]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    model = nn.Identity()
    if wanted:
        assert depth.Distance(name)(model, cut, None, dense).total / 2 == pytest.approx(wanted, abs=1e-6)
    assert depth.Distance(name)(model, dense, None, dense).total == 0
    assert depth.Distance(name)(model, cut, None, dense).total > 0


def test_weights_of_a_block_add_up_and_its_ends_may_be_protected() -> None:
    model = decoder(8)
    graph, batches = traced(model), taught(model)
    plain = depth.DepthMagnitude()(graph)
    wanted = sum(float(p.detach().abs().sum()) for p in model.layers[5].parameters())
    assert plain["layers.5"] == pytest.approx(wanted)
    squares = depth.DepthMagnitude(p=2)(graph)["layers.5"]
    assert squares == pytest.approx(sum(float(p.detach().square().sum()) for p in model.layers[5].parameters()))
    assert list(depth.DepthMagnitude(first=4, last=2)(graph)) == ["layers.4", "layers.5"]
    assert list(depth.DepthTaylor(batches, untaught, first=4, last=2)(graph)) == ["layers.4", "layers.5"]
    with pytest.raises(ScoreError, match="3 parts can't go: there are 2 that may"):
        depth.OneShot(depth.DepthMagnitude(first=4, last=2))(graph, 3)
    with pytest.raises(ScoreError, match="all 5 parts are protected by first=4 and last=2"):
        depth.DepthMagnitude(first=4, last=2)(traced(decoder(5)))


def test_taylor_adds_gradients_up_before_it_takes_the_absolute_value() -> None:
    model = decoder(3)
    graph, batches = traced(model), taught(decoder(3, seed=1))
    found = depth.DepthTaylor(batches, untaught)(graph)
    sum(untaught(model(batch["tokens"]), batch) for batch in batches).backward()
    for k, layer in enumerate(model.layers):
        wanted = sum(float((p * p.grad).detach().abs().sum()) for p in layer.parameters() if p.grad is not None)
        assert found[f"layers.{k}"] == pytest.approx(wanted)


class Noisy(Turning):
    """Draws noise before and behind its blocks."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.blocks(x + torch.randn_like(x))
        return x + torch.randn_like(x)


def test_the_shift_of_outputs_by_hand_and_with_noise() -> None:
    batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [5.0, 0.0]])]
    found = depth.OutputShift(batches, "blocks")(traced(Turning(TRIPLES), batches[0]))
    std = math.sqrt(8 / 3)  # of 1, 3, 5
    assert found == pytest.approx({"blocks.0": 2 * 3 + 2 * std})
    noisy = traced(Noisy([[0.0, 0.0], [0.0, 0.0]], TRIPLES), batches[0])
    found = depth.OutputShift(batches, "blocks")(noisy)
    assert found["blocks.0"] == 0 < found["blocks.1"]
    with pytest.raises(DataError, match="of several shapes"):
        depth.OutputShift([torch.ones(1, 3, 2), torch.ones(1, 4, 2)])(traced(Turning(TRIPLES), torch.ones(1, 3, 2)))


def test_random_scores_depend_on_the_seed_and_the_name() -> None:
    graph = traced(decoder(3))
    assert depth.DepthRandom(1)(graph) == depth.DepthRandom(1)(graph) != depth.DepthRandom(2)(graph)
    assert set(depth.DepthRandom(of="branches")(graph)) == {branch.name for branch in graph.branches}


@pytest.mark.parametrize(("mode", "wanted"), [("paper", 109), ("reference", 100)])
def test_merged_layers_by_hand(mode: str, wanted: float) -> None:
    states = [{"weight": torch.full((1, 1), float(x)), "norm": torch.full((1,), float(x))} for x in (1, 10, 100)]
    found = depth.merged(states, mode)
    assert found["weight"].item() == wanted and found["norm"].item() == 1
    alike = depth.merged([states[1]] * 3, mode)
    assert alike["weight"].item() == 10
    with pytest.raises(ScoreError, match="same names and shapes"):
        depth.merged([states[0], {"weight": torch.zeros(1, 1)}])


def test_laco_merges_where_the_last_hidden_states_keep_their_direction() -> None:
    model = decoder(5)
    graph, batches = traced(model), texts()
    assert not depth.Laco(batches, threshold=1.0)(graph).merges
    found = depth.Laco(batches, layers=3, threshold=-1.1)(graph)
    assert [(m.into, m.gone) for m in found.merges] == [
        ("layers.2", ("layers.3", "layers.4")),
        ("layers.0", ("layers.1", "layers.2")),
    ]
    assert found.gone == ("layers.3", "layers.4", "layers.1", "layers.2")
    assert all(name.startswith("layers.0.") for name in found.state)
    with pytest.raises(ScoreError, match="6 blocks from 0 to 4 can't be merged"):
        depth.Laco(batches, layers=6)(graph)


def test_the_cosine_of_a_merge_is_that_of_the_merged_model() -> None:
    model, batches = decoder(5), texts()
    (merge, other) = depth.Laco(batches, threshold=-1.1, low=2)(traced(model)).merges[:2]
    assert (merge.into, merge.gone, other.into) == ("layers.3", ("layers.4",), "layers.2")

    def stream(held: Any, layers: int, ids: Tensor) -> Tensor:
        x = held.embedding(ids)
        for layer in held.layers[:layers]:
            x = layer(x)
        return x.flatten(1)

    smaller = copy.deepcopy(model)
    for name, parameter in smaller.layers[3].named_parameters():
        if parameter.ndim > 1:  # with one partner its matrices are the result
            parameter.data = model.layers[4].get_parameter(name).data
    with torch.no_grad():
        cosines = [torch.cosine_similarity(stream(model, 5, ids), stream(smaller, 4, ids)) for ids in batches]
    assert merge.cosine == pytest.approx(float(torch.cat(cosines).mean()))
