"""Parameters and buffers that only the training forward reads are cut along."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph import rules
from depgraph.rules import registry
from tests.test_end_to_end import zeroed


class Auxiliary(nn.Module):
    """A classifier with a second head on the way, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 5)
        self.side = nn.Sequential(
            nn.Conv2d(16, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        made = self.head(torch.relu(self.norm(self.second(x))).mean((2, 3)))
        return (made, self.side(x)) if self.training else made


class Codebook(nn.Module):
    """A vector-quantising autoencoder whose codes follow a moving average in training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 12), nn.Linear(12, 6)
        self.register_buffer("codes", torch.randn(9, 12))
        self.register_buffer("average", torch.randn(9, 12))

    def forward(self, x: Tensor) -> Tensor:
        made = self.encoder(x)
        shares = (-torch.cdist(made, self.codes)).softmax(-1)
        if self.training:
            self.average.mul_(0.9).add_(shares.detach().T @ made.detach(), alpha=0.1)
            self.codes.copy_(self.average)
        return self.decoder(shares @ self.codes)


@pytest.mark.parametrize("mode", [True, False])
def test_a_head_for_training_fits_after_the_cut_and_trains(mode: bool) -> None:
    torch.manual_seed(0)
    model, x = Auxiliary().train(mode), torch.randn(4, 3, 8, 8)
    plan = depgraph.trace(model, (x,)).plan(importance.Random(seed=0), depgraph.Target(params=0.5))
    pruned, expected = plan.apply().train(), zeroed(model, plan).train()
    assert pruned.side[0].in_channels < 16 and pruned.side[0].out_channels < 8
    for got, wanted in zip(pruned(x), expected(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    sum(made.square().mean() for made in pruned(x)).backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    assert model.training is mode


def test_buffers_that_training_writes_fit_after_the_cut() -> None:
    torch.manual_seed(0)
    model, x = Codebook().eval(), torch.randn(4, 6)
    graph = depgraph.trace(model, (x,))
    plan = graph.cut_plan({"encoder.weight:0": [1, 5, 7]})
    pruned = plan.apply(form="module")
    assert pruned.average.shape == pruned.codes.shape == (9, 9)
    before = pruned.average.clone()
    with torch.no_grad():
        pruned.train()(x)
    assert not torch.equal(before, pruned.average)


def test_a_training_forward_that_the_example_does_not_go_through_changes_nothing() -> None:
    class Picky(Auxiliary):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            if self.training and target is None:
                raise ValueError("targets are needed in training")
            return super().forward(x)

    graph = depgraph.trace(Picky(), (torch.randn(4, 3, 8, 8),))
    assert not graph.capture.trained
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_with_report()
    assert any("doesn't read them: side.0.weight" in note for note in report.notes)


def test_a_training_forward_that_no_rule_copes_with_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(op: rules.Op) -> None:
        raise KeyError("an argument that this use doesn't have")

    monkeypatch.setitem(registry._TABLE, "aten.adaptive_avg_pool2d", fails)
    graph = depgraph.trace(Auxiliary(), (torch.randn(4, 3, 8, 8),))
    assert not graph.capture.trained and graph.note == ""
    assert graph["first.weight:0"].prunable.all()
