"""Ctrl-C ends the command with one sentence and nothing half-done, whatever the library it arrives in makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from depgraph import cli, interruption

ROOT = Path(__file__).resolve().parent.parent
STARTS = {
    "script": ["-c", "import sys; from depgraph.__main__ import main; sys.exit(main())"],
    "module": ["-m", "depgraph"],
}
ARRIVES = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
ASKED = ARRIVES.replace("SIGINT", "SIGTERM")
MANGLED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
raise AttributeError("half imported")
"""
MODELS = """
import torch
from depgraph import interruption

def press():
    try:
        interruption._press(2, None)
    except KeyboardInterrupt:
        pass

def swallowed():
    press()
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.randn(2, 4)

def mangled():
    press()
    raise AttributeError("half imported")
"""


def started(arguments: list[str], path: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which finds the modules in `path` first."""
    return subprocess.run(
        [sys.executable, *arguments, "inspect", "m"],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("torch", [ARRIVES, ASKED, MANGLED])
def test_an_interruption_while_torch_is_imported(tmp_path: Path, start: str, torch: str) -> None:
    (tmp_path / "torch.py").write_text(torch)
    done = started(STARTS[start], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted: nothing was written\n")


def test_other_errors_at_the_start_are_not_taken_for_interruptions(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    done = started(STARTS["module"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: broken\n")


@pytest.mark.parametrize("function", ["swallowed", "mangled"])
@pytest.mark.parametrize("command", ["prune", "export"])
def test_an_interruption_that_a_library_swallows_or_mangles_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], function: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interruption, "_pressed", [])
    Path("m.py").write_text(MODELS)
    options = {"prune": ["--keep", "params=0.5", "--out", "small"], "export": ["--out", "m.onnx"]}[command]
    assert cli.main([command, f"m.py:{function}", *options]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert not {"small", "m.onnx"} & {path.name for path in tmp_path.iterdir()}


def test_a_press_right_after_another_does_not_stop_the_clearing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_pressed", [])
    with pytest.raises(KeyboardInterrupt):
        interruption._press(2, None)
    interruption._press(2, None)
    with pytest.raises(KeyboardInterrupt):
        interruption.check()


def test_nothing_is_moved_into_place_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from depgraph.storage import appearing
    from exporters.onnx_file import publish, staging

    monkeypatch.setattr(interruption, "_pressed", [0.0])
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "folder") as folder:
        (folder / "file").write_text("x")
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "m.onnx") as draft:
        draft.write_text("x")
        publish(draft, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
