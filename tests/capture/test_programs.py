"""Programs of torch.export and TorchScript in the place of modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import depgraph
import importance
from depgraph.errors import CaptureError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        found: Tensor = self.head(x.flatten(2).mean(2))
        return found


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _exported(model: nn.Module) -> Any:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model, (X,), dynamic_shapes={"x": {0: batch}})


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "made",
    [_exported, torch.jit.script, lambda model: torch.jit.trace(model, X)],
    ids=["exported", "scripted", "traced"],
)
def test_a_program_is_cut_as_its_module_is(made: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    program = made(model)
    graph = depgraph.trace(program, () if made is _exported else X)
    score, target = importance.Magnitude(), depgraph.Target(params=0.6)
    pruned = graph.plan(score, target).apply()
    expected = depgraph.trace(model, X).plan(score, target).apply()
    other = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(pruned(other), expected(other))
        depgraph.save(pruned, tmp_path / "pruned")
        assert torch.equal(depgraph.load(tmp_path / "pruned", graph.model)(other), pruned(other))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_torch_makes_no_program_of_is_said() -> None:
    class Printing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            names = ["a", "b"]
            names.append(str(x.size(0)))
            assert "".join(names).split("a"), names
            return x

    with pytest.raises(
        CaptureError, match="Printing is TorchScript, of which torch can make no program .*give the module"
    ):
        depgraph.trace(torch.jit.script(Printing()), X)
    with pytest.raises(CaptureError, match="by position"):
        depgraph.trace(torch.jit.script(Net().eval()), kwargs={"x": X})


def test_what_wraps_a_model_for_training_is_told_apart() -> None:
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(CaptureError, match=r"prune what it wraps, model\.module"):
        depgraph.trace(wrapped, X)
