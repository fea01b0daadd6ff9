"""What the model's code keeps of a captured run."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import depgraph


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
