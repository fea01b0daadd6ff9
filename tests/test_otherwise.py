"""Weights that only another choice reads go along with what they would be given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance

WIDTH, INNER, REAL, ALL = 8, 10, 3, 14


class Mostly(nn.Module):
    """Most of what the router chooses among does nothing, and its bias keeps the example from the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, ALL), nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(REAL, INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(REAL, WIDTH, INNER) / 3)
        with torch.no_grad():
            self.router.bias[:REAL] = -50.0

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up[e])), self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        shares, index = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in index.unique():
            token, place = torch.where(index == e)
            made = self.expert(int(e), x[token]) if int(e) < REAL else x[token]
            out.index_add_(0, token, made * shares[token, place, None])
        return self.out(x + out)


class Branching(Mostly):
    """An expert beside others, in a module of its own, that is run where it is the best of two."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.up = nn.Parameter(torch.randn(1, INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(1, WIDTH, INNER) / 3)
        with torch.no_grad():
            self.router.bias[0] = -50.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        best = self.router(x).mean(0).argmax(-1)
        return self.out(self.expert(0, x) if best == 0 else x)


KINDS = [Mostly, Branching]


def traced(kind: type[Mostly]) -> tuple[depgraph.DependencyGraph, Tensor]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(9, 5)
    return depgraph.trace(model, x), x


def choose_them(model: nn.Module) -> None:
    with torch.no_grad():
        model.router.bias[: model.up.shape[0]].add_(100.0)  # type: ignore[union-attr,index,operator]


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_that_the_example_passes_by_are_an_axis(kind: type[Mostly]) -> None:
    graph, x = traced(kind)
    (inner,) = [axis for axis in graph.axes if any(m.target == "up" for m in axis.members) and axis.size == INNER]
    assert {(m.target, m.dim) for m in inner.members} == {("up", 1), ("down", 2)} and inner.prunable.all()
    pruned = graph.cut_plan({inner.name: [0, 3, 7]}).apply()
    choose_them(pruned)
    choose_them(graph.model)
    whole = graph.model(x)
    with torch.no_grad():
        graph.model.down[..., [0, 3, 7]] = 0.0  # type: ignore[index,operator]
    torch.testing.assert_close(pruned(x), graph.model(x))
    assert not torch.allclose(whole, graph.model(x), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_holds_where_the_model_chooses_otherwise(kind: type[Mostly], tmp_path: Path) -> None:
    graph, x = traced(kind)
    stream = next(axis for axis in graph.axes if any(m.target == "enter.weight" for m in axis.members))
    assert {"up", "down", "router.weight", "out.weight"} <= {m.target for m in stream.members}
    report = graph.cut_plan({stream.name: [1, 4]}).apply_with_report()
    assert report.check is not None and report.check.error < 1e-5
    pruned = report.model
    assert pruned.up.shape[-1] == pruned.down.shape[1] == WIDTH - 2
    depgraph.save(pruned, tmp_path / "cut")
    loaded = depgraph.load(tmp_path / "cut", model=kind()).eval()
    choose_them(loaded)
    choose_them(graph.model)
    keep = [k for k in range(WIDTH) if k not in (1, 4)]
    with torch.no_grad():  # the original with these rows of zeros, so that nothing arrives or leaves there
        graph.model.enter.weight[[1, 4]] = 0.0  # type: ignore[union-attr,index,operator]
        graph.model.enter.bias[[1, 4]] = 0.0  # type: ignore[union-attr,index,operator]
        graph.model.down[:, [1, 4]] = 0.0  # type: ignore[index,operator]
    torch.testing.assert_close(loaded(x), graph.model(x))
    assert torch.equal(loaded.enter.weight, graph.model.enter.weight[keep])  # type: ignore[union-attr,index]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind: type[Mostly]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(9, 5)
    before, out = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(x)
    attributes = dict(vars(model))
    depgraph.trace(model, x)
    assert model.training and vars(model) == attributes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), out)


def test_what_no_choice_reads_is_still_left_alone() -> None:
    class More(Mostly):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(WIDTH, WIDTH)

    graph, _ = traced(More)
    assert [value.target for value in graph.capture.program.unread()] == ["idle.weight", "idle.bias"]
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8))
    report = plan.apply_with_report()
    assert any("idle.weight" in note for note in report.notes)
