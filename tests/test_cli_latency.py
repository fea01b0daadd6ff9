"""`depgraph profile`, and `depgraph prune --keep latency=...,size=...` from outside. No time is asserted."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer

import exporters
from depgraph import cli
from depgraph.cli.keeping import parse_keep

MODELS = """
import torch
from torch import nn

def net(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(32, 5)), torch.randn(2, 3, 12, 12)

def one(): return net(64)
def other(): return net(48)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("given") / "given.py"
    file.write_text(MODELS)
    return file


@pytest.fixture(scope="module")
def file(given: Path) -> Path:
    """The first model as a file, exported once."""
    model, x = runpy.run_path(str(given))["one"]()
    exporters.to_onnx(model.eval(), (x,), given.parent / "one.onnx")
    return given.parent / "one.onnx"


@pytest.fixture(scope="module")
def profile(file: Path) -> Path:
    """A profile of the first model, with times that hold exactly: 1 ms for whatever takes the most."""
    path = file.parent / "profile.json"
    assert cli.main(["profile", str(file), "--out", str(path), "--runs", "2"]) == 0
    data = json.loads(path.read_text())
    for node in data["dense"]["nodes"]:
        node["ms"] = 1.0 if node["op"] == "Conv" else 0.01
    data["dense"]["ms"] = sum(node["ms"] for node in data["dense"]["nodes"])
    for key, entry in data["micro"].items():
        step = 1 if key.startswith("matmul") else 16
        entry["ms"] = [0.001 * -(-a // step) * -(-b // step) for a, b in entry["points"]]
    path.write_text(json.dumps(data))
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_time_and_size_are_met_and_told(
    capsys: pytest.CaptureFixture[str], given: Path, profile: Path, tmp_path: Path
) -> None:
    wish = ("prune", f"{given}:one", "--keep", "latency=0.6,size=60kB", "--profile", profile)
    code, out, _ = said(capsys, *wish, "--out", tmp_path / "small", "--onnx", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["latency"]["predicted_ms"] <= 0.6 * data["latency"]["dense_ms"]
    assert data["latency"]["measured"]["share"] > 0
    assert data["after"]["bytes"] <= 60_000
    code, out, _ = said(capsys, *wish, "--dry-run")
    assert code == 0
    assert "predicted on" in out


def test_a_kit_is_written_as_a_new_folder(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    code, out, _ = said(capsys, "profile", file, "--kit", tmp_path / "kit")
    assert code == 0
    assert "python measure.py" in out
    assert {"measure.py", "kit.json", "dense.onnx"} <= {path.name for path in (tmp_path / "kit").iterdir()}
    code, _, err = said(capsys, "profile", file, "--kit", tmp_path / "kit")
    assert code == 7
    assert "error:" in err


def test_what_holds_the_time_is_said(capsys: pytest.CaptureFixture[str], file: Path, profile: Path) -> None:
    wish = ("prune", file, "--keep", "latency=1us", "--profile", profile, "--dry-run")
    code, _, err = said(capsys, *wish)
    assert code == 4
    assert "ms at the least; what remains is held by conv2d" in err


def test_a_profile_of_another_model_is_refused(capsys: pytest.CaptureFixture[str], given: Path, profile: Path) -> None:
    code, _, err = said(capsys, "prune", f"{given}:other", "--keep", "latency=0.5", "--profile", profile, "--dry-run")
    assert code == 2
    assert "one model on one size of input" in err


def test_a_profile_of_another_machine_is_told(
    capsys: pytest.CaptureFixture[str], file: Path, profile: Path, tmp_path: Path
) -> None:
    data = json.loads(profile.read_text())
    data["machine"] |= {"cpu": "Cortex-A72", "instructions": []}
    (tmp_path / "there.json").write_text(json.dumps(data))
    wish = (
        "prune",
        file,
        "--keep",
        "latency=0.6",
        "--profile",
        tmp_path / "there.json",
        "--dry-run",
        "--json",
    )
    code, out, err = said(capsys, *wish)
    assert code == 0
    assert "measured on Cortex-A72" in err
    assert "no AVX" in err
    assert json.loads(out)["latency"]["device"] == "Cortex-A72"


@pytest.mark.parametrize("arguments", [(), ("--out", "p.json", "--kit", "kit")])
def test_profile_says_where_to_measure(
    capsys: pytest.CaptureFixture[str], given: Path, arguments: tuple[str, ...]
) -> None:
    code, _, err = said(capsys, "profile", f"{given}:one", *arguments)
    assert code == 2
    assert "--kit FOLDER" in err


@pytest.mark.parametrize(
    ("text", "given", "milliseconds", "share"),
    [
        ("params=0.7,macs=0.6", {"params": 0.7, "macs": 0.6}, None, None),
        ("size=30MB,latency=20ms", {"bytes": 30_000_000}, 20.0, None),
        ("bytes=1.5MiB", {"bytes": 1_572_864}, None, None),
        ("bytes=0.5", {"bytes": 0.5}, None, None),
        ("latency=0.02s", {}, 20.0, None),
        ("latency=0.5", {}, None, 0.5),
    ],
)
def test_units(text: str, given: dict[str, Any], milliseconds: float | None, share: float | None) -> None:
    found = parse_keep(text)
    assert (found.given, found.milliseconds, found.share) == (given, milliseconds, share)


@pytest.mark.parametrize(
    "text", ["latency=20", "latency=fast", "latency=-1ms", "size=30XB", "size=", "latency=1ms,latency=2ms"]
)
def test_what_is_no_unit_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="--keep"):
        parse_keep(text)


def test_a_profile_needs_a_time() -> None:
    with pytest.raises(typer.BadParameter, match="latency=20ms"):
        parse_keep("params=0.5", Path("p.json"))
