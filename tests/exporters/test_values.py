"""Models whose way depends on values: exported where no input of the file decides it, else refused by the input's name."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import depgraph
import exporters
import importance
from depgraph.capture.frozen import frozen
from depgraph.errors import ExportError


class Grids(nn.Module):
    """Images of several sizes packed into one sequence, as `grid` says: each attends to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        hidden, done = self.embed(patches), []
        for part in hidden.split(grid.prod(-1).tolist()):
            large = part.shape[0] > 5
            done.append(part + self.mix(part).softmax(0) * part.mean(0) if large else part)
        scores = self.head(torch.cat(done))
        return scores + scores.topk(2).indices[:, :1]  # a choice among values, which is no decision


class Signed(nn.Module):
    """Goes by the sign of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(x + y)
        return self.last(hidden.relu() if hidden.sum() > 0 else hidden)


class Counting(nn.Module):
    """Its buffer says how often it repeats itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.times: Tensor
        self.register_buffer("times", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.times > 2:
            x = x * 2
        for _ in range(int(self.times)):
            x = self.layer(x).relu()
        return x


GRIDS = (torch.randn(10, 6), torch.tensor([[2, 2], [2, 3]]))


def test_an_input_that_decides_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"values of 'grid' at .*test_values.py:.*constants=\('grid',\)"):
        exporters.to_onnx(Grids(), GRIDS, tmp_path / "grids.onnx")
    assert not list(tmp_path.iterdir())


def test_built_in_values_are_no_inputs_of_the_file(tmp_path: Path) -> None:
    model, path = Grids(), tmp_path / "grids.onnx"
    report = exporters.to_onnx(model, GRIDS, path, options=exporters.OnnxOptions(constants=("grid",)))
    session = onnxruntime.InferenceSession(path)
    assert [given.name for given in session.get_inputs()] == ["patches"]
    assert not report.dynamic.get("patches")
    other = torch.randn(10, 6)
    given = session.run(None, {"patches": other.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model(other, GRIDS[1]), rtol=1e-4, atol=1e-5)


def test_what_activations_decide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="values of 'x', 'y' at .*torch.cond there.$"):
        exporters.to_onnx(Signed(), (torch.randn(2, 6), torch.randn(2, 6)), tmp_path / "signed.onnx")


def test_what_only_the_model_decides_is_exported(tmp_path: Path) -> None:
    model, path = Counting(), tmp_path / "counting.onnx"
    exporters.to_onnx(model, torch.randn(2, 6), path)
    other = torch.randn(2, 6)
    given = onnxruntime.InferenceSession(path).run(None, {"x": other.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model(other), rtol=1e-4, atol=1e-5)


class Unexportable(nn.Module):
    """Forgets its mask when it is told that it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = None if torch.compiler.is_exporting() else torch.ones_like(x[:, :1])
        return self.last(self.first(x).relu() * mask)


def test_what_fails_only_when_it_is_exported_is_cut_and_exported_as_it_runs(tmp_path: Path) -> None:
    model, path = Unexportable().eval(), tmp_path / "unexportable.onnx"
    graph = depgraph.trace(model, torch.randn(2, 6))
    assert graph.note == "captured on the values of the example, as torch can't capture it without"
    pruned = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply()
    report = exporters.to_onnx(pruned, torch.randn(2, 6), path)
    assert any("torch.export can't capture the model" in note for note in report.notes)
    other = torch.randn(2, 6)
    given = onnxruntime.InferenceSession(path).run(None, {"x": other.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), pruned(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("names", "said"), [(("size",), "names 'size'"), (("patches", "grid"), "names every input")])
def test_constants_must_be_some_of_the_inputs(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=said):
        exporters.to_onnx(Grids(), GRIDS, tmp_path / "x.onnx", options=exporters.OnnxOptions(constants=names))


def test_a_value_written_through_a_view_carries_what_it_depends_on() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            board = torch.zeros(4)
            board[1:].copy_(y)
            return x * 2 if board.sum() > 0 else x

    found = frozen(Writing(), (torch.randn(2), torch.ones(3)), {})
    assert found.inputs == (1,)
    assert found.module(torch.ones(2), torch.ones(3)).tolist() == [2.0, 2.0]
