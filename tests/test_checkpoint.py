"""Saved equals loaded, in both forms; folders appear whole or not at all."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import CheckpointError
from tests.test_cutting import planned
from tests.test_end_to_end import random_scores, tensors
from tests.zoo import MODULES, ZOO


def outputs(model: nn.Module, plan: depgraph.Plan) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(model.eval()(*plan.graph.args, **plan.graph.kwargs))


def assert_same(a: nn.Module, b: nn.Module, plan: depgraph.Plan) -> None:
    for x, y in zip(outputs(a, plan), outputs(b, plan), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def recorded(model: nn.Module) -> dict[str, Any]:
    """The record without what it was built from, which that of a plain folder says, too."""
    return {**model.depgraph_record, "original": None}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["llama_8_4", "gpt2", "bert_classifier", "vit", "t5", "whisper", "mamba"])
def test_a_transformers_model_comes_back_as_its_own_class(name: str, tmp_path: Path) -> None:
    plan = planned(name)
    pruned = plan.apply(form="module")
    depgraph.save(pruned, tmp_path / "saved")
    loaded = depgraph.load(tmp_path / "saved")
    assert type(loaded) is type(pruned)
    assert_same(pruned, loaded, plan)
    assert recorded(loaded) == recorded(pruned)
    if name == "llama_8_4":
        ids = torch.randint(2, 50, (1, 5))
        made = [m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (pruned, loaded)]
        assert torch.equal(*made)


@pytest.mark.parametrize("name", ["residual_cnn", "multihead_attention", "tied_weights"])
def test_any_module_is_loaded_into_the_unpruned_one(name: str, tmp_path: Path) -> None:
    plan = planned(name)
    pruned = plan.apply()
    depgraph.save(pruned, tmp_path / "saved")
    loaded = depgraph.load(tmp_path / "saved", model=lambda: MODULES[name]().model)
    assert_same(pruned, loaded, plan)
    with pytest.raises(CheckpointError, match="pass model="):
        depgraph.load(tmp_path / "saved")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    depgraph.save(planned("mlp").apply(), tmp_path / "saved")
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "saved" / "depgraph.json").read_text())


def test_a_uniform_plan_is_a_plain_transformers_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    example = ZOO["qwen3"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.75), scope="uniform")
    pruned = plan.apply(form="module")
    report = depgraph.save(pruned, tmp_path / "saved")
    assert report.format == "plain", report.why
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        got, expected = (m.eval()(**example.kwargs).logits for m in (loaded, pruned))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_folders_that_cannot_be_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = planned("mlp").apply()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="isn't empty"):
        depgraph.save(pruned, tmp_path / "full")
    with pytest.raises(CheckpointError):
        depgraph.load(tmp_path / "none")
    with pytest.raises(CheckpointError):
        depgraph.load(tmp_path / "full")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("depgraph.storage.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        depgraph.save(pruned, tmp_path / "disk")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


class Stateful(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3))),
            "module '0' is quantised, and its",
        ),
        (lambda: nn.Sequential(Stateful(4, 3)), "module '0' keeps an extra state, which can't be saved"),
        (lambda: Stateful(4, 3), "module 'Stateful' keeps an extra state"),
    ],
)
def test_what_could_only_be_saved_in_part_is_refused(tmp_path: Path, model: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        depgraph.save(model(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["", "config.json"])
def test_a_folder_where_a_disk_is_mounted_is_filled_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    rename, mounted = Path.rename, tmp_path / "mounted"
    pruned = planned("llama_8_4").apply(form="module")
    depgraph.save(pruned, mounted)
    before = sorted(mounted.iterdir())

    def guarded(self: Path, target: Path) -> Path:
        if self == mounted or (self.name == fails and "partial" in self.parent.name):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", guarded)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == mounted)
    if fails:
        with pytest.raises(CheckpointError, match="Device or resource busy"):
            depgraph.save(pruned, mounted, overwrite="replace")
    else:
        depgraph.save(pruned, mounted, overwrite="replace")
    assert sorted(mounted.iterdir()) == before
    assert type(depgraph.load(mounted)) is type(pruned)


def test_a_config_with_infinity_comes_back(tmp_path: Path) -> None:
    example = ZOO["llama_8_4"]()
    example.model.config.limits = [0.0, math.inf, -math.inf]
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    pruned = graph.plan(random_scores(graph), depgraph.Target(params=0.8)).apply(form="module")
    assert depgraph.save(pruned, tmp_path / "saved").format == "depgraph"
    assert depgraph.load(tmp_path / "saved").config.limits == [0.0, math.inf, -math.inf]


def test_a_truncated_file_and_the_wrong_model_are_refused(tmp_path: Path) -> None:
    depgraph.save(planned("mlp").apply(), tmp_path / "saved")
    with pytest.raises(CheckpointError):
        depgraph.load(tmp_path / "saved", model=nn.Linear(3, 3))
    weights = tmp_path / "saved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        depgraph.load(tmp_path / "saved", model=MODULES["mlp"]().model)


def test_a_plain_directory_holds_all_it_needs_whatever_module_is_given(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    inputs = {"input_ids": torch.arange(16).view(1, 16)}
    graph = depgraph.trace(model, (), inputs)
    smaller = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8), scope="uniform").apply()
    assert depgraph.save(smaller, tmp_path / "saved").format == "plain"
    loaded = depgraph.load(tmp_path / "saved", model=copy.deepcopy(model))
    assert torch.equal(loaded(**inputs).logits, smaller(**inputs).logits)
