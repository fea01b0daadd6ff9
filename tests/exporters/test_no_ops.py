"""Small numbers that keep a logarithm or a quotient finite are in the file."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

import exporters
from exporters.no_ops import _constants, exact_no_ops


class SmallNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = torch.relu(self.layer(x))
        return (
            (found * torch.log(found + 1e-12)).sum(1),
            found / (found.norm(dim=1, keepdim=True) + 1e-9),
            torch.rsqrt(found.sum(1) - -1e-10) * (1 + 2e-6),
        )


def test_what_keeps_numbers_finite_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = SmallNumbers(), tmp_path / "m.onnx"
    exporters.to_onnx(model, torch.randn(2, 4), path)
    for x in (torch.randn(3, 4), torch.zeros(2, 4)):
        given = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
        for got, wanted in zip(given, model(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), wanted.detach(), rtol=1e-5, atol=1e-6)


def test_the_rules_are_as_they_were_afterwards() -> None:
    before = [(constant._rel_tol, constant._abs_tol) for constant in _constants()]
    with exact_no_ops():
        assert before and {(c._rel_tol, c._abs_tol) for c in _constants()} == {(0.0, 0.0)}
    assert [(constant._rel_tol, constant._abs_tol) for constant in _constants()] == before
