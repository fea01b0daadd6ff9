"""From a budget to a folder that runs, for ONNX files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import depgraph
from depgraph import cli
from depgraph.errors import DataError, ExportError, ScoreError, TargetError
from depgraph.npz import NpzFolder
from exporters import quantise, to_onnx
from exporters.building import Budget, Ways, build, file_subject
from exporters.building.precisions import file_bytes
from exporters.feeds import Feeds
from exporters.quantising import QuantOptions

QUICK = Ways(("magnitude",), shares=(), probes=2)


class Pair(nn.Module):
    """Takes two inputs, and has a block that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 48), nn.Linear(7, 48)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48)) for _ in range(2))
        self.head = nn.Linear(48, 5)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.left(left) + self.right(right))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    to_onnx(Pair().eval(), (torch.randn(3, 12), torch.randn(3, 7)), tmp_path / "pair.onnx")
    return tmp_path / "pair.onnx"


def _batches(count: int) -> list[Feeds]:
    drawn = np.random.default_rng(0)
    names = {"left": (3, 12), "right": (3, 7)}
    return [{n: drawn.standard_normal(shape).astype(np.float32) for n, shape in names.items()} for _ in range(count)]


def test_a_file_is_built_within_its_bytes_and_runs(file: Path, tmp_path: Path) -> None:
    batches, most = _batches(6), int(file_bytes(file) * 0.5)
    built = build(
        file_subject(file, batches), Budget(bytes=most), tmp_path / "small", Ways(("obs",), shares=(0.8,), probes=2)
    )
    folder, story = tmp_path / "small", built.story
    assert 0.8 * most < file_bytes(folder / "model.onnx") <= most
    session, dense = (onnxruntime.InferenceSession(str(path)) for path in (folder / "model.onnx", file))
    ours, theirs = (one.run(None, batches[-1])[0] for one in (session, dense))
    apart = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert built.best.quality == pytest.approx(apart, rel=1e-3), "the last fifth is held out"
    assert (
        story.quality[0].name == "output shift"
        and story.quality[0].before == 0
        and "1 held-out" in story.quality[0].data
    )
    assert story.check is not None and story.check.error < 1e-4 and story.sensitivity is not None
    assert story.sensitivity.figure == "output shift" and "of the loss" not in (folder / "report.html").read_text()
    assert len(story.sensitivity.curves) == 2 and story.sensitivity.curves[0].changes[0] > 0  # type: ignore[operator]
    assert {path.name for path in folder.iterdir()} >= {
        "run.py",
        "example.npz",
        "plan.json",
        "report.html",
        "report.json",
    }
    assert depgraph.Plan.load(depgraph.trace(file, batches[0]), folder / "plan.json").cost() == story.after


def test_fewer_bits_leave_the_file_that_they_are_of_beside(file: Path, tmp_path: Path) -> None:
    ways = Ways(("magnitude",), ("float32", "int8-dynamic"), shares=(), probes=0)
    built = build(file_subject(file, _batches(2)), Budget(bytes_share=0.45), tmp_path / "small", ways)
    assert built.best.precision == "int8-dynamic" and built.best.of_file and built.best.quality < 0.3
    float32 = tmp_path / "small" / "float32.onnx"
    assert {one.name: one.bytes for one in built.story.files}["float32.onnx"] == file_bytes(float32)
    again = depgraph.trace(float32).dense_cost
    assert again.params == built.story.after.params


def test_limits_in_milliseconds_hold_for_files(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"within 1e-05 ms: .* ms at the least.*held by"):
        build(file_subject(file, _batches(2)), Budget(latency_ms=1e-5), tmp_path / "small", QUICK)
    built = build(file_subject(file), Budget(latency_share=0.999, bytes_share=0.7), tmp_path / "small", QUICK)
    assert [t.kind for t in built.story.timings] == ["predicted", "measured"]


def _half(file: Path) -> Path:
    quantise(file, file.with_name("half.onnx"), _batches(1), options=QuantOptions("float16"))
    return file.with_name("half.onnx")


@pytest.mark.parametrize(
    ("ways", "given", "error", "says"),
    [
        (Ways(("taylor",)), lambda file: file, ScoreError, "'taylor' needs gradients, which an ONNX file doesn't give"),
        (Ways(("magnitude",), depth_shares=("both",)), lambda file: file, ScoreError, "changes of the loss"),
        (QUICK, _half, ExportError, "in float16, and a file is built from float32"),
    ],
)
def test_what_a_file_does_not_give_is_refused(
    ways: Ways, given: Callable[[Path], Path], error: type[Exception], says: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        build(file_subject(given(file), _batches(2)), Budget(bytes_share=0.5), tmp_path / "small", ways)
    assert not (tmp_path / "small").exists()


def test_a_batch_that_lacks_an_input_is_named(file: Path) -> None:
    with pytest.raises(DataError, match="lacks the input 'right': the file takes 'left', 'right'"):
        file_subject(file, [{"left": np.zeros((3, 12), np.float32)}])
    with pytest.raises(DataError, match="there are no batches"):
        file_subject(file, [])


def test_some_of_a_folder_are_those_files_in_order(tmp_path: Path) -> None:
    for k in range(5):
        np.savez(tmp_path / f"{k}.npz", k=np.array(k))
    folder = NpzFolder(tmp_path)
    assert [int(batch["k"]) for batch in folder[-2:]] == [3, 4] and len(folder[:-2]) == 3 and len(folder) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--scope", "both"), 2, "changes of the loss, which an ONNX file doesn't give"),
        (("--length", "12"), 2, "--length 12 is for PyTorch models"),
        (("--opset", "23"), 2, "--opset 23 is for PyTorch models"),
        (("--recipes", "llm_pruner"), 2, "needs gradients"),
        (("--recipes", "obs"), 2, "'obs' needs data"),
        (("--open", "rows"), 2, "--open 'rows': give the name of an open size"),
        (("--data", "pair.onnx"), 2, "--data pair.onnx is no folder"),
    ],
)
def test_the_command_refuses_what_files_can_not_be_asked(
    arguments: tuple[str, ...],
    code: int,
    says: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(file.parent)
    assert cli.main(["build", "pair.onnx", "--size", "50%", *arguments, "--out", "small"]) == code
    assert says in capsys.readouterr().err
    assert not Path("small").exists()


def test_the_command_builds_a_file_at_sizes_that_are_given(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    model = ir.load(file)
    for value in model.graph.inputs:
        value.shape = ir.Shape(["rows", *value.shape[1:]])  # type: ignore[index,misc]
    ir.save(model, "open.onnx")
    assert cli.main(["build", "open.onnx", "--size", "50%", "--open", "rows=5", "--out", "small"]) == 0
    story = json.loads(Path("small/report.json").read_text())
    assert story["making"]["settings"]["sizes"] == "left 5x12, right 5x7"
