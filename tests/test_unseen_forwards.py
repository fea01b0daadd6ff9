"""More ways of writing a model that no example in this repository has; see `test_unseen.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import exporters
from tests.test_unseen import cut


@torch.compile(dynamic=True)
def gated(x: Tensor, gate: Tensor) -> Tensor:
    return torch.relu(x) * torch.sigmoid(gate)


class CompiledWithin(nn.Module):
    """A function of the forward is compiled, the module isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.gate, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(gated(self.made(x), self.gate(x)))


def test_a_function_that_is_compiled_runs_as_it_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8)
    report = cut(CompiledWithin(), example)
    assert report.form == "module" and report.model.out.in_features < 16
    exporters.to_onnx(report.model, (example,), tmp_path / "m.onnx")
