"""The benchmark of scores prints its tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_benchmark_of_scores_prints_tables(workspace: Path, run_python: Callable[..., str]) -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "importance").glob("*.py")))
    (workspace / "text.txt").write_text(text)
    model = "examples/assets/tiny-llama"
    lines = run_python(
        str(ROOT / "benchmarks/scores.py"), model, "text.txt", "--keep", "0.8", "--seeds", "1"
    ).splitlines()
    assert lines[0].startswith("dense perplexity")
    assert sum(line.startswith("| 80% | ") and line.count(" to ") == 1 for line in lines) == 7
    assert [line for line in lines if line.startswith(("| hidden width | ", "| 4 | "))]
