"""A capture holds what its forward holds, not all that this computes."""

from __future__ import annotations

import gc
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.capture import spent
from depgraph.capture.memory import Memory
from depgraph.capture.spent import Spent

LARGE = 1 << 16


def _held() -> int:
    """How many large tensors have memory."""
    found = {}
    for one in gc.get_objects():
        if type(one) is Tensor and one.device.type == "cpu" and one.numel() >= LARGE:
            found[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(size > 0 for size in found.values())


class Decides(nn.Module):
    """A long chain whose way depends on a value, with a skip, a view and a list that outlive what they were made of."""

    held: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skip, view = torch.tanh(x), torch.cos(x)[1:]
        seen = [torch.sin(x)]
        for _ in range(30):
            x = self.inner(torch.relu(x)).clamp(-1, 1)
        if bool((x.mean() > -2).item()):
            x = x + skip
        self.held.append(_held())
        return self.last(x + seen[0]) + view.sum() / LARGE


def test_what_nobody_reads_any_more_is_let_go_while_values_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spent, "PAUSE", 1 << 20)
    torch.manual_seed(0)
    model, example = Decides().eval(), torch.randn(LARGE // 16, 4)
    plan = depgraph.trace(model, example).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    assert "values of the example" in plan.graph.note
    assert 3 <= Decides.held[-1] < 20  # of over ninety
    report = plan.apply_with_report()
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


def test_memory_that_something_else_shows_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spent, "PAUSE", 0)
    alive: list[Tensor] = []
    keeps = Spent(alive, Memory(alive))

    def made(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        keeps.made(tensor)
        return tensor

    listed, array, storage = [made(torch.ones(4))], made(torch.ones(4)).numpy(), made(torch.ones(4)).untyped_storage()
    shown = made(torch.ones(4))[1:]
    weight = torch.ones(4, requires_grad=True)
    product = weight * made(torch.full((4,), 2.0))  # autograd keeps it
    for _ in range(2):
        made(torch.ones(4))
    product.sum().backward()
    assert listed[0].tolist() == array.tolist() == [1] * 4 and shown.tolist() == [1] * 3
    assert storage.nbytes() == 16 and weight.grad.tolist() == [2] * 4
    assert [t.untyped_storage().nbytes() for t in alive] == [16] * 5 + [0, 16]


@cache
def _table(size: int) -> Tensor:
    """What the code computes once and keeps."""
    return torch.arange(float(size)).sin()


class KeepsATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x + _table(8)


def test_what_the_code_keeps_is_computed_without_the_rest_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    model, example = KeepsATable().eval(), torch.randn(2, 8)
    monkeypatch.setattr("depgraph.capture.leaving.map_arg", _counting(ran))
    depgraph.trace(model, example)
    assert 0 < len(ran) < 12  # the table's own operators
    assert torch.equal(_table(8), torch.arange(8.0).sin())


def _counting(ran: list[object]) -> object:
    def counted(args: object, load: object) -> object:
        ran.append(args)
        return torch.fx.node.map_arg(args, load)

    return counted
