"""`depgraph inspect` and `depgraph prune` on ONNX files."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

import depgraph
from depgraph.cli import main
from tests.onnx_door.building import mlp


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(mlp(), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return Path("model.onnx")


def test_a_file_is_pruned_to_a_smaller_file(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(file), "--keep", "macs=0.6", "--out", "smaller.onnx", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["kept"]["macs"] <= 0.6 and told["files"] == ["smaller.onnx"] and not told["check"]["vacuous"]
    graph = depgraph.trace("smaller.onnx")
    assert graph.dense_cost.macs == told["after"]["macs"]
    assert main(["prune", str(file), "--keep", "macs=0.6", "--out", "smaller.onnx"]) == 7
    assert "exists: name another file" in capfd.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["model.onnx", "smaller.onnx"]


def test_a_file_is_inspected(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [(axis["role"], axis["groups"], axis["prunable"]) for axis in told["axes"]] == [("neurons", 16, 16)]
    assert [layer["operator"] for layer in told["layers"]] == ["linear", "linear"]
    assert main(["inspect", str(file), "--html", "page.html"]) == 0
    assert "model.onnx" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--score", "taylor"), 2, "score 'taylor' needs a model that runs in PyTorch"),
        (("--device", "cuda"), 2, "--device cuda is for PyTorch models"),
        (("--out", "folder"), 7, "names no ONNX file"),
        (("--keep", "macs=0.0001"), 4, "can't be met"),
    ],
)
def test_what_a_file_can_not_be_asked_for(
    options: tuple[str, ...], code: int, says: str, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"--keep": "macs=0.6", "--out": "smaller.onnx"} | {options[0]: options[1]}
    assert main(["prune", str(file), *(part for pair in given.items() for part in pair)]) == code
    assert says in capfd.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["model.onnx"]
