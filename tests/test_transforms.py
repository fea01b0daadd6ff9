"""Parts of a forward under autocast or the transforms of torch.func: what these make of the code is what is captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.errors import UnsupportedOperator
from tests.test_end_to_end import zeroed


class Autocast(nn.Module):
    """A part in half precision, as in code that was made for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.hidden, self.head = nn.Linear(16 * 36, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = F.relu(self.hidden(F.relu(self.norm(self.conv(x))).flatten(1)))
        return self.head(x.float())


class Gradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 32), nn.Linear(32, 1)

    def energy(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)) ** 2).sum()

    def forward(self, x: Tensor) -> Tensor:
        return -torch.func.grad(self.energy)(x)


class Jacobian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(self.net))(x)


class Ensemble(nn.Module):
    """The same layers with stacked weights, mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bias = nn.Parameter(torch.randn(5, 6, 32) / 2), nn.Parameter(torch.randn(5, 32))
        self.outer = nn.Parameter(torch.randn(5, 32, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        def member(inner: Tensor, bias: Tensor, outer: Tensor) -> Tensor:
            return torch.relu(x @ inner + bias) @ outer

        return torch.vmap(member)(self.inner, self.bias, self.outer)


MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...], str]] = {
    "autocast": (Autocast, (2, 3, 8, 8), "hidden.weight:0"),
    "grad": (Gradient, (5, 6), "inner.weight:0"),
    "jacobian": (Jacobian, (4, 6), "net.0.weight:0"),
    "ensemble": (Ensemble, (4, 6), "inner:2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_code_within_is_pruned_like_any_other(name: str) -> None:
    torch.manual_seed(0)
    cls, shape, axis = MODELS[name]
    model = cls().eval()
    graph = depgraph.trace(model, (torch.randn(shape),))
    assert graph[axis].size == 32 and not graph.unknown
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6), only=[axis])
    report = plan.apply_with_report(form="module")
    assert report.check is not None and not report.check.vacuous
    pruned, expected, other = report.model, zeroed(model, plan), torch.randn(shape)
    close = {"rtol": 2e-2, "atol": 2e-2} if name == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(pruned(other), expected(other), **close)


def test_strict_refuses_a_part_that_torch_takes_for_one_operator() -> None:
    with pytest.raises(UnsupportedOperator, match="wrap_with_autocast"):
        depgraph.trace(Autocast().eval(), (torch.randn(2, 3, 8, 8),), strict=True)
