"""Code that asks for the size of its input: what is captured holds on one side of the answer only, and a file must not say more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import exporters
from depgraph.errors import ExportError


class Otherwise(nn.Module):
    """Something else from a batch of four on."""

    def __init__(self, same: bool = False) -> None:
        super().__init__()
        self.layer, self.same = nn.Linear(3, 2), same

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if x.shape[0] >= 4 else y + 0 if self.same else -y


@pytest.mark.parametrize(("batch", "ends"), [(2, "batch up to 3"), (6, "batch from 4")])
def test_a_size_that_decides_what_is_computed_does_not_stay_free(tmp_path: Path, batch: int, ends: str) -> None:
    x = torch.randn(batch, 3)
    report = exporters.to_onnx(Otherwise().eval(), x, tmp_path / "m.onnx")
    assert report.dynamic == {}
    assert ends in report.notes[0]
    with pytest.raises(ExportError, match=f"holds for {ends} only"):
        exporters.to_onnx(Otherwise().eval(), x, tmp_path / "asked.onnx", dynamic={"x": {0: "batch"}})
    assert not (tmp_path / "asked.onnx").exists()


def test_a_size_that_decides_nothing_that_can_be_seen_stays_free(tmp_path: Path) -> None:
    model = Otherwise(same=True).eval()
    report = exporters.to_onnx(model, torch.randn(6, 3), tmp_path / "m.onnx")
    assert report.dynamic == {"x": {0: "batch"}}
    x = torch.randn(2, 3)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).detach().numpy(), atol=1e-6)


def test_a_failed_export_leaves_nothing_on_the_inputs(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ExportError, match="fixes dim 1"):
        exporters.to_onnx(nn.Linear(3, 2).eval(), x, tmp_path / "m.onnx", dynamic={"input": {1: "width"}})
    exporters.to_onnx(nn.Linear(3, 2).eval(), x, tmp_path / "m.onnx", dynamic=exporters.STATIC)
    assert onnxruntime.InferenceSession(tmp_path / "m.onnx").get_inputs()[0].shape == [2, 3]


def test_an_example_without_values_is_exported(tmp_path: Path) -> None:
    report = exporters.to_onnx(nn.Linear(3, 2).eval(), torch.zeros(0, 3), tmp_path / "m.onnx")
    assert report.dynamic == {"input": {0: "batch"}}


@pytest.mark.parametrize("given", [None, np.zeros((2, 3), np.float32), {"input": torch.zeros(2, 3)}])
def test_inputs_that_are_none_are_said(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ExportError, match=f"inputs are a {type(given).__name__}: give a tuple"):
        exporters.to_onnx(nn.Linear(3, 2).eval(), given, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"record": "all"}, {"rtol": -1}, {"atol": float("nan")}, {"constants": "input"}]
)
def test_options_that_are_none_are_said(options: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=next(iter(options))):
        exporters.OnnxOptions(**options)
