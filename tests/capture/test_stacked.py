"""Models that map over stacked parameters, take gradients in their forward, or multiply with sparse matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.plan import Plan
from tests.test_end_to_end import zeroed


class Ensemble(nn.Module):
    """Four small networks with stacked weights, all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 6, 24)), nn.Parameter(torch.randn(4, 24, 3))

    def forward(self, x: Tensor) -> Tensor:
        def one(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
            return (x @ first).relu() @ second

        return torch.func.vmap(one, in_dims=(0, 0, None))(self.first, self.second, x).mean(0)


class Adapted(nn.Module):
    """One step of descent on its own weight before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.key, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(12, 3)
        self.fast = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        key = self.key(hidden)
        with torch.enable_grad():
            fast = self.fast.requires_grad_()
            (step,) = torch.autograd.grad(((key.tanh() @ fast - hidden) ** 2).sum(), fast)
        return self.head(hidden + key @ (fast - 0.1 * step))


class Neighbours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 16, bias=False), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(torch.sparse.mm(edges, self.first(x)).relu())


def planned(model: nn.Module, *args: Tensor) -> Plan:
    torch.manual_seed(0)
    return depgraph.trace(model.eval(), args).plan(importance.Magnitude(), depgraph.Target(params=0.6))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_the_hidden_features_of_stacked_networks_go_together(form: str) -> None:
    torch.manual_seed(0)
    model = Ensemble().eval()
    graph = depgraph.trace(model, (torch.rand(5, 6),))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6), only=["first:2"])
    pruned = plan.apply(form=form)
    assert pruned.first.shape[2] == pruned.second.shape[1] < 24
    x = torch.rand(7, 6)
    torch.testing.assert_close(pruned(x), zeroed(model, plan)(x))


def test_a_step_of_descent_in_the_forward_is_followed() -> None:
    model = Adapted()
    plan = planned(model, torch.rand(5, 6))
    pruned = plan.apply()
    assert pruned.fast.numel() < model.fast.numel()
    x = torch.rand(4, 6)
    torch.testing.assert_close(pruned(x), zeroed(model, plan)(x))


def test_features_go_on_the_dense_side_of_a_sparse_product() -> None:
    model = Neighbours()
    plan = planned(model, torch.rand(6, 5), torch.eye(6).to_sparse())
    pruned = plan.apply(form="module")
    assert pruned.first.out_features < 16
    given = torch.rand(8, 5), (torch.rand(8, 8) > 0.5).float().to_sparse()
    torch.testing.assert_close(pruned(*given), zeroed(model, plan)(*given))
