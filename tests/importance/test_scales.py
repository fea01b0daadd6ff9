"""Scales of normalisations are found by what the graph does, however a model writes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.errors import ScoreError
from importance import ColumnMagnitude, Magnitude, NormScale
from tests.zoo import MODULES, ZOO

SCALE = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0, -0.1])


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def deviation(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


def variance(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * (var + 1e-5) ** -0.5


class Scaled(nn.Module):
    """A linear map, a scale on what `made` makes of it, and a reader."""

    def __init__(self, made: Callable[[Tensor], Tensor], offset: float = 0.0) -> None:
        super().__init__()
        self.made, self.offset = made, offset
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.factor = nn.Parameter(SCALE - offset)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor + self.offset if self.offset else self.factor
        return self.last(factor * self.made(self.first(x)))


WRITTEN = [
    rms,
    layer,
    deviation,
    variance,
    F.normalize,
    lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: F.rms_norm(x, x.shape[-1:]),
]


@pytest.mark.parametrize("made", WRITTEN)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_multiplies_a_normalisation_is_its_scale(made: Callable[[Tensor], Tensor], offset: float) -> None:
    graph = depgraph.trace(Scaled(made, offset), torch.randn(3, 4))
    (found,) = NormScale()(graph).values()
    assert found == pytest.approx(SCALE.abs().tolist(), abs=1e-6)


def test_a_scale_may_be_multiplied_before_what_it_scales_is_normalised() -> None:
    class Before(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.factor * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    (found,) = NormScale()(depgraph.trace(Before(torch.tanh), torch.randn(3, 4))).values()
    assert found == pytest.approx(SCALE.abs().tolist(), abs=1e-6)

    class Measured(Scaled):
        """What is normalised away is no scale."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.factor * self.first(x)
            return self.last(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    with pytest.raises(ScoreError, match="no normalisation in Measured has a scale"):
        NormScale()(depgraph.trace(Measured(torch.tanh), torch.randn(3, 4)))


@pytest.mark.parametrize("scorer", [NormScale(), ColumnMagnitude()])
def test_weights_without_values_and_stale_graphs_are_refused(scorer: NormScale | ColumnMagnitude) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(ScoreError, match="'0.weight' .*meta device"):
        scorer(graph)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    graph = depgraph.trace(model, torch.randn(2, 5))
    model[2].weight = nn.Parameter(torch.randn(3, 6))
    with pytest.raises(ScoreError, match="'2.weight' .*trace the model again"):
        scorer(graph)


@pytest.mark.parametrize(
    "made",
    [
        torch.tanh,
        lambda x: x,
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    ],
)
def test_what_multiplies_something_else_is_none(made: Callable[[Tensor], Tensor]) -> None:
    graph = depgraph.trace(Scaled(made), torch.randn(3, 4))
    with pytest.raises(ScoreError, match="no normalisation in Scaled has a scale"):
        NormScale()(graph)


def network(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.copy_(SCALE)
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("mode", [True, False])
def test_scales_of_batch_norm_and_axes_without_one(mode: bool) -> None:
    model = network(nn.BatchNorm2d(6)).train(mode)
    graph = depgraph.trace(model, torch.randn(2, 3, 8, 8))
    found = NormScale()(graph)
    assert found["0.weight:0"] == pytest.approx(SCALE.abs().tolist())
    bare = found["3.weight:0"]
    assert bare.min() > found["0.weight:0"].max()
    np.testing.assert_array_equal(np.argsort(bare), np.argsort(Magnitude()(graph)["3.weight:0"]))
    removal = graph.plan(NormScale(), depgraph.Target(params=0.8)).removal
    assert 3 in removal["0.weight:0"]
    assert not len(removal.get("3.weight:0", ()))


def test_group_norm_counts_and_its_groups_sum_their_channels() -> None:
    graph = depgraph.trace(network(nn.GroupNorm(3, 6)), torch.randn(2, 3, 8, 8))
    (name, labels) = next((a.name, m.labels) for a in graph.axes for m in a.members if m.target == "1.weight")
    expected = np.bincount(labels, weights=SCALE.abs().numpy())
    assert NormScale()(graph)[name] == pytest.approx(expected)


def test_a_stream_averages_the_norms_that_read_it() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    scales = {n: p for n, p in example.model.named_parameters() if p.ndim == 1}
    with torch.no_grad():
        for scale in scales.values():
            scale.copy_(torch.rand_like(scale))
    (stream,) = (a for a in graph.axes if any(m.target in scales for m in a.members))
    expected = torch.stack(list(scales.values())).abs().mean(0).detach()
    np.testing.assert_allclose(NormScale()(graph)[stream.name], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["residual_cnn", "dense_net"])
def test_the_plan_of_a_network_follows_its_scales(name: str) -> None:
    example = MODULES[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    found = NormScale()(graph)
    assert all(found[a.name].shape == (a.size,) for a in graph.axes)
    assert graph.plan(NormScale(), depgraph.Target(params=0.9)).removal


def test_scales_that_are_not_finite_are_named() -> None:
    model = network(nn.BatchNorm2d(6))
    graph = depgraph.trace(model, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        model[1].weight[2] = float("nan")
    with pytest.raises(ScoreError, match="scale of the normalisation at 1.weight holds NaN"):
        NormScale()(graph)
