"""The benchmark of scores prints its tables; the zoo makes any config tiny and takes a type through all its stages."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).resolve().parent.parent


def benchmark(name: str) -> ModuleType:
    """A module of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_language_models_config_becomes_tiny_and_consistent() -> None:
    zoo_configs = benchmark("zoo_configs")
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    dense = transformers.Qwen3NextConfig(num_hidden_layers=8, layer_types=kinds * 2)
    tiny = zoo_configs.shrink(dense, zoo_configs.LEVELS[0])
    assert tiny.num_hidden_layers == len(tiny.layer_types) == 2
    assert set(tiny.layer_types) == set(kinds)
    assert (tiny.hidden_size, tiny.num_attention_heads, tiny.head_dim, tiny.num_key_value_heads) == (64, 4, 16, 2)
    assert tiny.num_experts == 4
    assert tiny.num_experts_per_tok <= 2
    assert tiny.vocab_size <= 128
    assert dense.num_hidden_layers == 8


def test_sub_configs_become_tiny_together_and_images_keep_whole_patches() -> None:
    zoo_configs = benchmark("zoo_configs")
    tiny = zoo_configs.shrink(transformers.CLIPConfig(), zoo_configs.LEVELS[0])
    vision = tiny.vision_config
    assert vision.num_hidden_layers == tiny.text_config.num_hidden_layers == 2
    assert vision.hidden_size % vision.num_attention_heads == tiny.text_config.hidden_size % 4 == 0
    assert vision.hidden_size < 100
    assert vision.image_size % vision.patch_size == 0
    assert 0 <= tiny.text_config.eos_token_id < tiny.text_config.vocab_size <= 128
    assert len(tiny.vision_config.to_dict()) == len(transformers.CLIPConfig().vision_config.to_dict())


def test_one_type_goes_through_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    told: list[dict] = []
    benchmark("zoo_stages").cut_type("vit", told.append, with_onnx=False)
    known = {name: value for record in told for name, value in record.items() if name != "done"}
    assert [stage for record in told for stage in record.get("done", [])] == [
        "construct",
        "forward",
        "trace",
        "cut",
        "save",
    ]
    assert known["class"] == "ViTForImageClassification"
    assert known["after"] < 0.8 * known["params"]
    assert "failed" not in known


@pytest.mark.slow
def test_the_zoo_keeps_its_results_and_goes_on(workspace: Path, run_python: Callable[..., str]) -> None:
    printed = run_python(
        str(ROOT / "benchmarks/zoo.py"), "--only", "^vit$", "--no-onnx", "--results", "r.jsonl", "--report", "r.md"
    )
    record = json.loads((workspace / "r.jsonl").read_text())
    assert record["done"] == ["construct", "forward", "trace", "cut", "save"]
    assert "saved and loaded: 1 (100.0%)" in printed
    assert "| own forward runs | 1 |" in (workspace / "r.md").read_text()
    again = run_python(str(ROOT / "benchmarks/zoo.py"), "--only", "^vit$", "--no-onnx", "--results", "r.jsonl")
    assert again.splitlines() == printed.splitlines()[-1:]


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
