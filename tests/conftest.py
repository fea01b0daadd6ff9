"""What all tests share: one thread, fixed seeds, no network, and a folder with a copy of the examples to work in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SUBPROCESS_SECONDS = 900

torch.set_num_threads(1)
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("repeatable")


LONGEST = ("test_readme.py", "test_examples.py", "test_quality.py", "test_random_convolutions.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What .ci/run runs by name is slow; the longest tests go first, so that no worker is left with one of them at the end."""
    for item in items:
        if item.get_closest_marker("ci"):
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for a copy of `examples`; it is the working directory while the test runs."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


@pytest.fixture
def run_python(workspace: Path) -> Callable[..., str]:
    """Runs Python with these arguments in the workspace and returns what it printed; a failure fails the test."""

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args], cwd=workspace, capture_output=True, text=True, timeout=SUBPROCESS_SECONDS
        )
        if done.returncode:
            pytest.fail(f"python {' '.join(args)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run
