"""Models of which PyTorch and a right file may differ."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import exporters
from depgraph.errors import ExportError


class Choosing(nn.Module):
    """Keeps two of the positions whose score, mostly zero, is largest."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(6, 1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.score(x).squeeze(-1) - 9).relu()
        chosen = scores.topk(2, dim=-1).indices
        return self.value(x).gather(1, chosen[..., None].expand(-1, -1, 6)).sum(1)


class Captured(nn.Module):
    """Leaves out a mask, unless it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return hidden.tril() if torch.compiler.is_exporting() else hidden


def test_of_equal_values_the_file_takes_the_first(tmp_path: Path) -> None:
    model, x = Choosing(), torch.randn(2, 40, 6)
    report = exporters.to_onnx(model, x, tmp_path / "model.onnx")
    given = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model.value(x[:, :2]).sum(1).detach(), rtol=1e-4, atol=1e-5)
    assert any("among equal values" in note for note in report.notes)


def test_distinct_values_get_no_note(tmp_path: Path) -> None:
    model = Choosing()
    with torch.no_grad():
        model.score.bias.fill_(99)
    assert not exporters.to_onnx(model, torch.randn(2, 40, 6), tmp_path / "model.onnx").notes


def test_a_model_that_computes_something_else_when_captured_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="Captured gives another 'output' at the example when torch.export captures it"
    ):
        exporters.to_onnx(Captured(), torch.randn(2, 6, 6), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Noisy(nn.Module):
    """Adds noise, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + torch.randn_like(x)


def test_what_draws_random_numbers_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Noisy draws random numbers in eval mode \(aten\.randn_like\.default\)"):
        exporters.to_onnx(Noisy(), torch.randn(2, 4), tmp_path / "noisy.onnx")
    assert not (tmp_path / "noisy.onnx").exists()


class Windows(nn.Module):
    """Counts its rows as the code of windowed attention often does: by a division that `int` makes whole."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        windows = self.mix(x.view(-1, height // 2, 2, width, 6).transpose(2, 3).reshape(-1, 2, width, 6))
        rows = int(windows.shape[0] / (height * width / 2 / width))
        whole = windows.view(rows, height // 2, width, 2, -1).transpose(2, 3).reshape(rows, height, width, -1)
        return self.out(whole)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_size_that_the_code_makes_whole_by_int_is_fixed_at_the_examples(tmp_path: Path, batch: int) -> None:
    model, x, path = Windows(), torch.randn(batch, 4, 4, 6), tmp_path / "model.onnx"
    report = exporters.to_onnx(model, x, path)
    given = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert report.dynamic or any("fixes dim 0 of 'x' (batch)" in note for note in report.notes)


def test_a_size_that_is_asked_for_but_made_whole_by_int_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fixes dim 0 of 'x' \\(batch\\)"):
        exporters.to_onnx(Windows(), torch.randn(2, 4, 4, 6), tmp_path / "m.onnx", dynamic={"x": {0: "batch"}})


class Sampled(nn.Module):
    """Draws which of its rows it looks at, and takes the largest of equal numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.first(x)[:, torch.randint(x.shape[1], (3,))]
        return drawn + torch.zeros_like(drawn).topk(4)[1]


def test_what_draws_and_chooses_among_equals_is_said_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Sampled draws random numbers in eval mode \(aten\.randint\.default\)"):
        exporters.to_onnx(Sampled(), torch.randn(2, 8, 4), tmp_path / "sampled.onnx")
