"""The benchmark of recipes measures what isn't known yet, keeps what raises, and reports in order."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_benchmarks import ROOT, benchmark

ASSET = ROOT / "examples/assets/tiny-llama"
OPTIONS = ["--keep", "0.8", "0.1", "--seeds", "2", "--calibration", "8", "--held-out", "8", "--results", "r.jsonl"]


@pytest.fixture
def causal(workspace: Path) -> list[str]:
    """Arguments that name a tiny random language model and a text."""
    sizes = {"hidden_size": 16, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSET / name, "tiny")
    Path("text.txt").write_text("".join(path.read_text() for path in sorted((ROOT / "importance").glob("*.py"))))
    return ["--causal", "tiny", "text.txt", *OPTIONS]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The scripts of the benchmark; what they put into the path goes again."""
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples"), *sys.path])
    return {name: benchmark(name) for name in ("quality_report", "quality_subjects", "quality")}


def test_results_are_measured_once_and_failures_kept(
    causal: list[str], modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = modules["quality"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *causal, "--recipes", "random", "wanda_sp"])
    given = quality.arguments()
    quality.work("tiny", given)
    first = Path("r.jsonl").read_text()
    quality.work("tiny", given)
    assert Path("r.jsonl").read_text() == first

    records = [json.loads(line) for line in first.splitlines()]
    pruned = [r for r in records if r["keep"] is not None]
    assert [(r["recipe"], r["seed"], r["keep"]) for r in pruned] == [
        (recipe, seed, keep) for recipe in ("random", "wanda_sp") for seed in (0, 1) for keep in (0.8, 0.1)
    ]
    assert all(0.7 < r["kept"] <= 0.8 and r["quality"] > 1 for r in pruned if r["keep"] == 0.8)
    assert all("TargetError" in r["failed"] and "quality" not in r for r in pruned if r["keep"] == 0.1)
    assert next(r["mb"] for r in records if r["recipe"] == "dense") > 0


def _records(figures: dict[str, list[float]], metric: str) -> list[dict[str, Any]]:
    common = {"model": "toy", "calibration": 8, "held_out": 8}
    units = {"seconds": 2.0, "mb": 1.0, "weights_mb": 0.5, "backward_seconds": 5.0, "backward_mb": 2.0}
    found = [{**common, "recipe": "dense", "keep": None, "seed": None, "metric": metric, "quality": 0.9, **units}]
    for recipe, values in figures.items():
        cut = {"keep": 0.5, "kept": 0.45, "seconds": 3.0, "mb": 1.0}
        found += [{**common, "recipe": recipe, "seed": s, "quality": v, **cut} for s, v in enumerate(values)]
    return found


@pytest.mark.parametrize(
    ("metric", "chain", "against"),
    [
        ("accuracy", "flap ~ obs, magnitude", None),
        ("perplexity", "magnitude, obs ~ flap", "| obs | magnitude | 1 of 1 |"),
    ],
)
def test_recipes_are_ordered_by_the_metric_and_ties_are_told(
    modules: dict[str, Any], metric: str, chain: str, against: str | None
) -> None:
    report = modules["quality_report"]
    found = _records({"obs": [0.6, 0.7], "flap": [0.65, 0.75], "magnitude": [0.2, 0.3]}, metric)
    found.append({**found[-1], "recipe": "cfsp", "failed": "NothingToPrune: no neurons"})
    text = report.markdown(report.tables(found))
    assert f"| toy | 50% | {chain} |" in text
    assert (against in text) if against else "| obs | magnitude |" not in text
    assert "| cfsp | raises |" in text
    assert "- cfsp at 50% raises NothingToPrune: no neurons" in text
    assert "| obs |  |  | 1.50 | 2.00 |" in text


def test_what_was_written_by_hand_stays_above_the_tables(workspace: Path, modules: dict[str, Any]) -> None:
    report, path = modules["quality_report"], Path("q.md")
    report.write(path, _records({"obs": [0.5]}, "accuracy"))
    path.write_text("Findings.\n" + path.read_text())
    report.write(path, _records({"obs": [0.6]}, "accuracy"))
    text = path.read_text()
    assert text.startswith("Findings.\n# Quality")
    assert "60.0%" in text
    assert "50.0%" not in text


@pytest.mark.slow
def test_the_script_measures_and_reports(causal: list[str], run_python: Callable[..., str]) -> None:
    script = [str(ROOT / "benchmarks/quality.py"), *causal, "--recipes", "random", "magnitude", "--report", "q.md"]
    printed, text = run_python(*script), Path("q.md").read_text()
    assert "tiny random 0.8 1" in printed
    assert "## tiny: perplexity, dense" in text
    assert "| random | " in text
    assert "| magnitude | " in text
