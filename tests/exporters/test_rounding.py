"""Models that make much of rounding: what only rounds is written, what computes something else isn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import exporters
from exporters import translations
from exporters.onnx_check import Differs


class MakesMuchOfRounding(nn.Module):
    """Large numbers cancel in a product, so that the order of its sums shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 512), nn.Linear(512, 512)
        with torch.no_grad():
            self.second.weight.sub_(self.second.weight.mean(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).abs() + 500.0)


def test_a_file_as_near_to_double_precision_as_pytorch_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MakesMuchOfRounding()
    report = exporters.to_onnx(model, torch.randn(2, 512), tmp_path / "m.onnx")
    assert any("double precision" in note for note in report.notes)


def test_another_computation_is_refused_however_much_rounding_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = translations.table

    def wrong(opset: int) -> object:
        return {**table(opset), torch.ops.aten.abs.default: lambda self: translations.op.Mul(self, self)}

    monkeypatch.setattr(translations, "table", wrong)
    torch.manual_seed(0)
    with pytest.raises(Differs):
        exporters.to_onnx(MakesMuchOfRounding(), torch.randn(2, 512), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
