"""Tensors that a model keeps from one forward to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance


class Biased(nn.Module):
    """An attention whose biases, looked up in a table, are kept by device while it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kept, self.names = 4, {}, {"a": torch.ones(1)}
        self.before, self.qkv, self.after = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 3)
        self.table = nn.Parameter(torch.randn(4, 10))
        self.register_buffer("rows", torch.randint(0, 10, (7, 7)), persistent=False)

    def train(self, mode: bool = True) -> Biased:
        self.kept = {}
        return super().train(mode)

    def biases(self) -> Tensor:
        if self.training:
            return self.table[:, self.rows]
        key = str(self.table.device)
        if key not in self.kept:
            self.kept[key] = self.table[:, self.rows]
        return self.kept[key]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).view(*x.shape[:2], self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        weights = (q @ k.transpose(-1, -2) / 8 + self.biases()).softmax(-1)
        return self.after((weights @ v).transpose(1, 2).flatten(2)) * self.names["a"]


def make() -> Biased:
    torch.manual_seed(0)
    return Biased().eval()


@pytest.mark.parametrize("when", ["before", "between"])
def test_what_was_kept_by_a_forward_is_made_again_of_what_is_left(when: str, tmp_path: Path) -> None:
    model, x = make(), torch.randn(2, 7, 6)
    if when == "before":
        expected = model(x)
    graph = depgraph.trace(model, x)
    if when == "between":
        expected = model(x)
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_with_report()
    assert report.form == "module"
    assert report.model.table.shape[0] == report.model.heads
    assert report.check is not None
    assert report.check.error < 1e-5
    torch.testing.assert_close(model(x), expected)
    again = depgraph.load(depgraph.save(report.model, tmp_path).path, model=model)
    torch.testing.assert_close(again(x), report.model(x))
    report.model.train()(x).sum().backward()
    assert report.model.table.grad is not None


def test_tensors_in_dicts_that_no_forward_makes_stay() -> None:
    model, x = make(), torch.randn(2, 7, 6)
    model(x)
    model.kept["elsewhere"] = torch.ones(2)
    kept, named = dict(model.kept), dict(model.names)
    depgraph.trace(model, x)
    assert all(model.kept[key] is tensor for key, tensor in kept.items())
    assert model.names == named


def test_an_interruption_leaves_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), torch.randn(2, 7, 6)
    model(x)
    kept = dict(model.kept)

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        depgraph.trace(model, x)
    assert model.kept.keys() == kept.keys() and all(model.kept[key] is tensor for key, tensor in kept.items())
