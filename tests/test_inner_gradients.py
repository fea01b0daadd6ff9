"""Models that take gradients in their forward: energies and forces, Hamiltonians, inner training steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import depgraph
import importance
from tests.test_end_to_end import zeroed


class Force(nn.Module):
    """An energy, and its gradient by what it is the energy of."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            energy = self.net(x).sum()
            return energy, torch.autograd.grad(energy, x, create_graph=True)[0]


class OneStep(nn.Module):
    """Takes a training step on one half of what it is given, and predicts the other half with the new weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weights = dict(self.net.named_parameters())
        with torch.enable_grad():
            loss = (functional_call(self.net, weights, (x,)) - y).square().mean()
            steps = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            moved = {name: w - 0.1 * step for (name, w), step in zip(weights.items(), steps, strict=True)}
            return functional_call(self.net, moved, (x.flip(0),))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


NETS = {
    "tanh": (nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), (4, 8)),
    "relu": (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)), (4, 8)),
    "silu": (nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1)), (2, 5, 8)),
    "attention": (Attention(), (2, 5, 8)),
    "conv": (nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(16, 1, 3)), (2, 3, 10, 10)),
}  # fmt: skip


def _other(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(t) for t in inputs)


@pytest.mark.parametrize("form", ["auto", "graph"])
@pytest.mark.parametrize("name", NETS)
def test_what_is_pruned_gives_the_zeroed_models_gradient_on_other_inputs(name: str, form: str) -> None:
    torch.manual_seed(0)
    net, shape = NETS[name]
    model, example = Force(net).eval(), (torch.randn(shape),)
    plan = depgraph.trace(model, example).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    pruned, expected = plan.apply(form=form), zeroed(model, plan)
    for inputs in (example, _other(example), _other(example)):
        torch.testing.assert_close(pruned(*inputs), expected(*inputs), rtol=1e-4, atol=1e-5)


def test_the_gradient_follows_weights_that_are_trained_after_the_cut() -> None:
    """No copy of a weight stays behind in the graph."""
    model, x = Force(NETS["silu"][0]).eval(), torch.randn(2, 5, 8)
    pruned = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply(form="graph")
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    step = torch.zeros_like(x)
    step[0, 0, 0] = 1e-2
    slope = (pruned(x + step)[0] - pruned(x - step)[0]) / 2e-2
    torch.testing.assert_close(pruned(x)[1][0, 0, 0], slope, rtol=1e-2, atol=1e-4)


def test_an_inner_training_step_is_part_of_the_graph() -> None:
    torch.manual_seed(0)
    model, example = OneStep().eval(), (torch.randn(8, 6), torch.randn(8, 1))
    plan = depgraph.trace(model, example).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    pruned, expected = plan.apply(), zeroed(model, plan)
    for inputs in (example, _other(example)):
        torch.testing.assert_close(pruned(*inputs), expected(*inputs), rtol=1e-4, atol=1e-5)
