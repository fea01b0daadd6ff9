"""Experts whose weights are parameters of their own: in a list or dict of parameters, or by number beside others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.report import uncovered
from tests.test_expert_stacks import Looped, Ranged, cut_of_half, cut_of_two, experts, traced
from tests.test_experts import EXPERTS, INNER, WIDTH


class Listed(Looped):
    """Lists of parameters, of which those are looked up that were chosen."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("up", "down", "bias"):
            whole = self._parameters.pop(name)
            setattr(self, name, nn.ParameterList(part.detach() for part in whole))  # type: ignore[union-attr]


class All(Listed):
    """Lists of parameters, in which all are taken in turn."""

    mixed = Ranged.mixed


class Joined(Listed):
    """Lists of parameters that are stacked in the forward, and looked up there."""

    def mixed(self, x: Tensor, shares: Tensor, index: Tensor) -> Tensor:
        up, down, bias = (torch.stack(list(held))[index] for held in (self.up, self.down, self.bias))
        inner = F.silu(torch.einsum("nkiw,nw->nki", up, x))
        return (shares.unsqueeze(-1) * (torch.einsum("nkwi,nki->nkw", down, inner) + bias)).sum(1)


class Numbered(Looped):
    """Parameters by number beside others."""

    def __init__(self) -> None:
        super().__init__()
        for e in range(EXPERTS):
            setattr(self, f"up_{e}", nn.Parameter(torch.randn(INNER, WIDTH) / 3))
            setattr(self, f"down_{e}", nn.Parameter(torch.randn(WIDTH, INNER) / 3))
        del self.up, self.down

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        up, down = (getattr(self, f"{name}_{int(e)}") for name in ("up", "down"))
        return F.linear(F.silu(F.linear(x, up)), down) + self.bias[e]


class Keyed(Numbered):
    """A dict of parameters, which has both by number."""

    def __init__(self) -> None:
        super().__init__()
        held = {name: self._parameters.pop(name) for name in list(self._parameters) if name != "bias"}
        self.held = nn.ParameterDict(held)

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        up, down = (self.held[f"{name}_{int(e)}"] for name in ("up", "down"))
        return F.linear(F.silu(F.linear(x, up)), down) + self.bias[e]


KINDS = [Listed, All, Joined, Numbered, Keyed]


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_leaves_with_its_parameters(kind: type[Looped], tmp_path: Path) -> None:
    plan, pruned = cut_of_two(kind, tmp_path)
    held = sum(p.numel() for p in plan.graph.model.parameters())
    whole = 2 * INNER * WIDTH + 2 * WIDTH + 1  # up, down, its bias, and its row of the router
    assert sum(p.numel() for p in pruned.parameters()) == held - 2 * whole


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_their_neurons_go_together_in_place(kind: type[Looped]) -> None:
    cut_of_half(kind)


def test_what_runs_an_expert_is_no_longer_counted() -> None:
    graph, x = traced(All)
    without = graph.cost({experts(graph).name: (0, 1)})
    each = len(x) * (2 * INNER * WIDTH + WIDTH)  # two products, and an output of the router
    assert graph.dense_cost.macs - without.macs == 2 * each


def test_numbered_parameters_follow_in_order() -> None:
    graph, _ = traced(Numbered)
    pruned = graph.cut_plan({experts(graph).name: [0]}).apply()
    for name in ("up", "down"):
        assert not hasattr(pruned, f"{name}_{EXPERTS - 1}")
        for e in range(EXPERTS - 1):
            assert torch.equal(getattr(pruned, f"{name}_{e}"), getattr(graph.model, f"{name}_{e + 1}"))


def test_lists_of_parameters_keep_their_length_and_can_grow_again() -> None:
    graph, _ = traced(Listed)
    pruned = graph.cut_plan({experts(graph).name: [2]}).apply()
    assert len(pruned.up) == EXPERTS - 1 and torch.equal(pruned.up[2], graph.model.up[3])  # type: ignore[index,union-attr]
    pruned.up.append(torch.zeros(INNER, WIDTH))
    assert len(list(pruned.up)) == EXPERTS


def test_experts_in_lists_of_parameters_are_ranked() -> None:
    graph, _ = traced(Listed)
    name = experts(graph).name
    with torch.no_grad():
        for held in (graph.model.up, graph.model.down, graph.model.bias):
            held[5].copy_(held[2])  # type: ignore[index,operator,union-attr]
        graph.model.router.weight[5] = graph.model.router.weight[2]  # type: ignore[index,union-attr]
    assert int(np.argmin(importance.ExpertClusters()(graph)[name])) in (2, 5)
    assert importance.Magnitude()(graph)[name].shape == (EXPERTS,)


class Scaled(Looped):
    """As many scales as experts, which aren't the experts'; so has `ListedScaled`, beside lists of experts' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(WIDTH) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x * scale
        return super().forward(x)


class ListedScaled(Scaled, Listed):
    pass


@pytest.mark.parametrize("kind", [Scaled, ListedScaled])
def test_a_list_of_parameters_beside_experts_stays(kind: type[Looped]) -> None:
    graph, _ = traced(kind)
    pruned = graph.cut_plan({experts(graph).name: [0]}).apply()
    assert len(pruned.scales) == EXPERTS and len(pruned.up) == EXPERTS - 1


@pytest.mark.parametrize("kind", [Ranged, All])
def test_without_weights_it_is_said_that_a_trial_needs_some(kind: type[Looped]) -> None:
    with torch.device("meta"):
        graph = depgraph.trace(kind().eval(), torch.randn(20, WIDTH))
    assert not any(axis.tried for axis in graph.axes)
    left = {entry.target: entry.reason for entry in uncovered(graph) if entry.dim == 0}
    assert "trace the model with some" in left["router.weight"] and "aten.eq" in left["router.weight"]
    assert "trace the model with some" not in left["out.weight"]


class Tagged(nn.Module):
    """Labels are chosen among as many as the weights of a recurrent layer have numbers, which are no parts that could leave."""

    def __init__(self, labels: int = 2) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)
        self.out, self.pairs = nn.Linear(12, labels), nn.Parameter(torch.randn(labels, labels))

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        scores = self.out(self.rnn(self.words(words))[0])
        found = scores.gather(2, labels[..., None]).sum(1) + self.pairs[labels[:, :-1], labels[:, 1:]].sum(1, True)
        return found - scores.logsumexp(2).sum(1, keepdim=True)


def test_a_trial_that_fails_halfway_leaves_the_model_as_it_was() -> None:
    model = Tagged().eval()
    before = {name: (id(held), held.shape) for name, held in model.named_parameters()}
    graph = depgraph.trace(model, (torch.randint(20, (2, 4)), torch.randint(2, (2, 4))))
    assert {name: (id(held), held.shape) for name, held in model.named_parameters()} == before
    assert graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report().check.error < 1e-4
