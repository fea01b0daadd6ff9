"""Code that asks for the values of constants which modules hold in plain tensors."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import exporters
from depgraph.errors import ExportError
from exporters.constants import ConstantsKnown


class Strides(nn.Module):
    """Makes a grid of places for each of several maps, which are as many pixels apart as a plain tensor says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 4, 3, s, 1) for s in (1, 2))
        self.stride = torch.tensor([8.0, 16.0])

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer, stride in zip(self.layers, self.stride, strict=True):
            made = layer(x)
            h, w = made.shape[2:]
            scale = torch.full((h * w, 1), stride) * float(self.stride.max()) / int(stride)
            found.append(made.flatten(2) * scale[:, 0] + torch.arange(h * w))
        return torch.cat(found, 2)


def test_numbers_that_a_plain_tensor_holds_leave_the_batch_free(tmp_path: Path) -> None:
    model = Strides()
    report = exporters.to_onnx(model, torch.randn(2, 3, 4, 4), tmp_path / "m.onnx")
    assert report.dynamic == {"x": {0: "batch"}}
    x = torch.randn(5, 3, 4, 4)
    given = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_constant_that_was_written_to_is_not_known() -> None:
    constant = torch.tensor([1.0, 2.0])
    with ConstantsKnown() as known:
        assert float(constant[0]) == 1.0
        constant.add_(1.0)
        assert known._value(constant) is None
        assert float(constant[0]) == 2.0


class DecidesByInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.limit = nn.Linear(4, 4), torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.mean()) > float(self.limit) else x


def test_values_of_inputs_are_none_of_these(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="branches on the values of 'x'"):
        exporters.to_onnx(DecidesByInput(), torch.randn(2, 4), tmp_path / "m.onnx")
