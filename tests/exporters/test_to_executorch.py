"""ExecuTorch files run in its runtime as the pruned modules do in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from depgraph.errors import ExportError
from exporters import to_executorch
from tests.exporters import pruned

pytestmark = pytest.mark.filterwarnings("ignore")
runtime = pytest.importorskip("executorch.runtime")

Made = Callable[[], tuple[nn.Module, Tensor]]


def run(file: Path, *inputs: Tensor) -> np.ndarray:
    program: Any = runtime.Runtime.get().load_program(file)
    (made,) = program.load_method("forward").execute(inputs)
    return made.clone().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("made", [pruned.cnn, pruned.vit, lambda: (pruned.llama(0.7), pruned.IDS)])
def test_a_pruned_model_runs_as_in_pytorch(made: Made, tmp_path: Path) -> None:
    model, example = made()
    report = to_executorch(model, example, tmp_path)
    other = example.flip(-1)
    with torch.no_grad():
        output = model(other)
    expected = output if isinstance(output, Tensor) else output.logits
    np.testing.assert_allclose(run(report.path, other), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert any("XNNPACK runs" in note and "runs 0 parts" not in note for note in report.notes)
    assert report.path == tmp_path / "model.pte" and report.bytes == report.path.stat().st_size


@pytest.mark.slow
def test_a_free_size_goes_up_to_its_largest(tmp_path: Path) -> None:
    model, example = pruned.cnn()
    batch = torch.export.Dim("batch", min=1, max=6)
    report = to_executorch(model, example, tmp_path / "small.pte", dynamic={"input": {0: batch}})
    assert len(report.shapes_checked) == 3
    other = torch.randn(5, *example.shape[1:])
    with torch.no_grad():
        np.testing.assert_allclose(run(report.path, other), model(other).numpy(), rtol=1e-4, atol=1e-5)


def test_a_free_size_without_a_largest_is_refused(tmp_path: Path) -> None:
    model, example = pruned.cnn()
    with pytest.raises(ExportError, match=r'Dim 0 of \'input\' is to be free, .*torch\.export\.Dim\("batch", max='):
        to_executorch(model, example, tmp_path, dynamic={"input": {0: "batch"}})
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    """A model whose path depends on the values it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_branches_on_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="can't capture Branching"):
        to_executorch(Branching(), torch.randn(2, 3), tmp_path)
    assert not list(tmp_path.iterdir())
