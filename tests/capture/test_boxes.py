"""Sizes that travel through a tensor: `n = torch.IntTensor([self.width])`, `x[:, : n[0]]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.capture.boxes import boxed


def gated(x: Tensor, sizes: Tensor) -> Tensor:
    n = sizes[0]
    return torch.tanh(x[:, :n]) * torch.sigmoid(x[:, n:])


class Waves(nn.Module):
    """Gated layers whose function is given the width in a tensor; the condition of all is one layer's, in parts."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.width, self.asks = 16, asks
        self.start, self.condition = nn.Conv1d(3, 16, 1), nn.Conv1d(5, 64, 1)
        self.layers = nn.ModuleList(nn.Conv1d(16, 32, 3, padding=1) for _ in range(2))
        self.mixes = nn.ModuleList([nn.Conv1d(16, 32, 1), nn.Conv1d(16, 16, 1)])
        self.end = nn.Conv1d(16, 4, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x, condition = self.start(x), self.condition(condition)
        skipped, width = torch.zeros_like(x), torch.IntTensor([self.width])
        for k, (layer, mix) in enumerate(zip(self.layers, self.mixes, strict=True)):
            part = condition[:, 2 * k * self.width : 2 * (k + 1) * self.width]
            made = mix(gated(layer(x) + part, width))
            if k == 0:
                x, made = x + made[:, : self.width], made[:, self.width :]
            skipped = skipped + made
        if self.asks and torch.isnan(skipped).any():
            skipped = torch.zeros_like(skipped)
        return self.end(skipped)


@pytest.mark.parametrize("asks", [False, True], ids=["plain", "asks for a value"])
def test_a_width_that_travels_in_a_tensor_is_cut_in_the_module(asks: bool) -> None:
    torch.manual_seed(0)
    model = Waves(asks).eval()
    graph = depgraph.trace(model, (torch.randn(2, 3, 9), torch.randn(2, 5, 9)))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6), form="module")
    report = plan.apply_with_report()
    assert report.form == "module"
    assert report.after.params <= 0.6 * report.before.params
    assert report.model.width == report.model.start.out_channels < 16
    others = torch.randn(3, 3, 14), torch.randn(3, 5, 14)
    assert report.model(*others).shape == model(*others).shape


class Run(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.half, self.run = 8, run
        self.first, self.last = nn.Linear(3, 16), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x[:, : self.half] * self.run(self, x))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: x[:, m.half : x.shape[1]],
        lambda m, x: x[:, torch.tensor(m.half) :],
        lambda m, x: x[:, torch.LongTensor([0, m.half]).to(torch.int32)[1].item() :],
        lambda m, x: x[:, int(torch.as_tensor([m.half])) :],
        lambda m, x: x.narrow(1, *torch.tensor([m.half, m.half]).tolist()),
    ],
    ids=["up to the end", "tensor", "item", "int", "tolist"],
)
def test_what_comes_out_of_a_tensor_is_the_size_that_went_in(run: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Run(run).eval()
    graph = depgraph.trace(model, (torch.randn(4, 3),))
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6), form="module").apply_with_report()
    assert report.form == "module"
    assert report.model.half == report.model.last.in_features < 8
    assert report.model(torch.randn(5, 3)).shape == (5, 2)


def test_a_tensor_that_is_written_to_holds_what_was_written() -> None:
    with boxed():
        sizes = torch.IntTensor([3, 5])
        first = sizes[0]
        assert torch.arange(9)[:first].tolist() == [0, 1, 2]
        sizes += 1
        assert torch.arange(9)[: sizes[0]].tolist() == [0, 1, 2, 3]
        assert (first.item(), sizes.tolist()) == (4, [4, 6])
        copy = torch.tensor([1, 2])
        copy[0] = 7
        assert int(copy[0]) == 7
        assert torch.tensor([2.5]).tolist() == [2.5]


def test_the_old_classes_of_tensors_are_what_they_were() -> None:
    names = ["ByteTensor", "CharTensor", "ShortTensor", "IntTensor", "LongTensor"]
    before = [getattr(torch, name) for name in names]
    with boxed():
        numbers = torch.LongTensor([1, 2])
        assert isinstance(numbers, torch.LongTensor)
        assert not isinstance(numbers, torch.IntTensor)
        assert torch.LongTensor.dtype is torch.int64
        assert torch.zeros(2).type(torch.IntTensor).dtype is torch.int32
        assert torch.LongTensor(2, 3).shape == (2, 3)
    assert [getattr(torch, name) for name in names] == before
