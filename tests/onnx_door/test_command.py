"""`depgraph inspect` and `depgraph prune` on ONNX files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import depgraph
from depgraph.cli import main
from tests.onnx_door.building import mlp, model, node, value, weights


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
        (
            ("--score", "taylor"),
            2,
            "score 'taylor' needs gradients, which an ONNX file doesn't give: load the PyTorch model",
        ),
        (("--recipe", "llm_pruner"), 2, "recipe 'llm_pruner' needs gradients, which an ONNX file doesn't give"),
        (("--recipe", "flap"), 2, "recipe 'flap' needs data: give a folder of .npz files"),
        (("--score", "flap"), 2, "score 'flap' needs data: give a folder of .npz files"),
        (("--size", "m=3"), 3, "the file has no open size 'm': it leaves open 'n'"),
        (("--only", "nothing*"), 2, "--only 'nothing*' names no axis"),
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


@pytest.fixture
def data(file: Path) -> Path:
    folder = Path("batches")
    folder.mkdir()
    for k, batch in enumerate(np.random.default_rng(0).standard_normal((3, 20, 6))):
        np.savez(folder / f"{k}.npz", x=batch.astype(np.float32), labels=np.zeros(20))
    return folder


@pytest.mark.parametrize(
    "how",
    [
        ("--score", "wanda-sp"),
        ("--score", "obs", "--allocation", "uniform"),
        ("--recipe", "flap"),
        ("--recipe", "best"),
    ],
)
def test_a_file_is_pruned_by_its_activations(
    how: tuple[str, ...], file: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["prune", str(file), "--keep", "params=0.6", "--data", str(data), "--json"]
    assert main([*given, *how, "--out", "smaller.onnx"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["kept"]["params"] <= 0.6 and not told["check"]["vacuous"]
    assert depgraph.trace("smaller.onnx").dense_cost.params == told["after"]["params"]
    assert any("make up for what went" in note for note in told["notes"]) == (how[0] == "--recipe")


def test_open_sizes_are_given_by_name(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for size in (3, 5):
        assert main(["inspect", str(file), "--size", f"n={size}", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["cost"]["macs"] == size * 9 * 16
    assert main(["inspect", str(file), "--size", "n"]) == 2
    assert "--size 'n': give the name of an open size" in capfd.readouterr().err
    assert (
        main(["prune", str(file), "--keep", "params=0.6", "--score", "flap", "--data", str(file), "--out", "a.onnx"])
        == 2
    )
    assert f"--data {file} is no folder" in capfd.readouterr().err


def _residual() -> onnx.ModelProto:
    """x [n, 6] -> width 8, three times x + relu(x A) B, -> y [n, 3]."""
    nodes, held, at = [node("MatMul", "x in", "s0")], weights(**{"in": (6, 8), "out": (8, 3)}), "s0"
    for k in range(3):
        held += weights(**{f"a{k}": (8, 12), f"b{k}": (12, 8)})
        nodes += [
            node("MatMul", f"{at} a{k}", f"h{k}"),
            node("Relu", f"h{k}", f"r{k}"),
            node("MatMul", f"r{k} b{k}", f"m{k}"),
        ]
        nodes += [node("Add", f"{at} m{k}", f"s{k + 1}")]
        at = f"s{k + 1}"
    return model([*nodes, node("MatMul", f"{at} out", "y")], [value("x", ["n", 6])], [value("y", ["n", 3])], held)


def test_branches_of_a_file_are_left_out(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx.save(_residual(), "deep.onnx")
    asked = ["prune", "deep.onnx", "--depth", "1", "--out", "shorter.onnx", "--json"]
    assert main([*asked, "--depth-score", "shortgpt:branches"]) == 2
    assert "depth score 'shortgpt:branches' needs data: give a folder of .npz files" in capfd.readouterr().err
    assert main([*asked, "--depth-score", "shortgpt:branches", "--data", str(data)]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["check"]["branches"] == 1 and not told["check"]["vacuous"]
    left = [n.op_type for n in onnx.load("shorter.onnx").graph.node]
    assert left.count("Add") == 2 and left.count("MatMul") == 6
    both = [
        "prune",
        "deep.onnx",
        "--keep",
        "macs=0.7",
        "--scope",
        "both",
        "--score",
        "obs",
        "--data",
        str(data),
        "--out",
        "b.onnx",
    ]
    assert main(both) == 2
    assert "changes of the loss by groups are measured in a PyTorch model" in capfd.readouterr().err
