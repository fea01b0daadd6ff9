"""Every example runs as it stands."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRAINING = "train_tiny_llama"
MARKS = {"digits": pytest.mark.slow, "demo": pytest.mark.ci, "quickstart": pytest.mark.ci}
QUICK = {"demo": ("--quick",)}  # the whole of it is run by a test below


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _scripts() -> list[Any]:
    """All examples but the training script, and the helpers that other examples import."""
    paths = sorted(EXAMPLES.glob("*.py"))
    helpers = set[str]().union(*map(_imports, paths))
    names = [path.stem for path in paths if path.stem not in {*helpers, TRAINING}]
    return [pytest.param(name, marks=MARKS.get(name, ())) for name in names]


@pytest.mark.parametrize("name", _scripts())
def test_example_runs_and_prints_something(name: str, run_python: Callable[..., str]) -> None:
    assert run_python(f"examples/{name}.py", *QUICK.get(name, ())).strip()


@pytest.mark.slow
def test_the_demo_shows_taylor_before_magnitude_before_random(run_python: Callable[..., str]) -> None:
    """Held-out perplexities at 80%: the mean of Random's seeds is the worst."""
    rows = [re.split(r"\s*[│┃]\s*", line) for line in run_python("examples/demo.py").splitlines()]
    found = {
        row[1].split(",")[0]: float(row[6].split()[0]) for row in rows if len(row) > 6 and row[2] in ("80%", "100%")
    }
    assert found["dense"] < found["taylor"] < found["magnitude"] < found["random"]


@pytest.mark.slow
def test_training_script_leaves_a_loadable_model(workspace: Path, run_python: Callable[..., str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_python(f"examples/{TRAINING}.py", "--steps", "2", "--out", "trained")

    record = json.loads((workspace / "trained" / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(workspace / "trained")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "trained")
    assert record["steps"] == 2
    assert model.num_parameters() == record["parameters"]
    assert len(tokenizer) == model.config.vocab_size
