"""A uniform plan of a transformers model is one more config: it loads without this library, and computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import depgraph
from depgraph.errors import NothingToPrune, TargetError
from tests.test_end_to_end import random_scores, tensors
from tests.zoo import ZOO
from tests.zoo.architectures import FREE, HEADS, WIDE, WORDS
from tests.zoo.configured import IDS, VOCAB, build, encoder_text, image, three_texts
from tests.zoo.example import Builder, Example, seeded

VISION = {**WIDE, "image_size": 24, "patch_size": 6}
GROUPED = {**WIDE, **WORDS, "num_key_value_heads": 4}
STORIES = {**HEADS, **WORDS, "hidden_size": 64, "head_dim": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}

OTHERS: dict[str, Builder] = {
    "llama_stories": build("LlamaForCausalLM", "LlamaConfig", three_texts, **STORIES),
    "mistral": build("MistralForCausalLM", "MistralConfig", three_texts, **GROUPED),
    "qwen2": build("Qwen2ForCausalLM", "Qwen2Config", three_texts, **GROUPED),
    "cohere": build("CohereForCausalLM", "CohereConfig", three_texts, **GROUPED),
    "granite": build("GraniteForCausalLM", "GraniteConfig", three_texts, **GROUPED),
    "olmo": build("OlmoForCausalLM", "OlmoConfig", three_texts, **GROUPED),
    "nemotron": build("NemotronForCausalLM", "NemotronConfig", three_texts, **{**GROUPED, **FREE}),
    "roberta": build("RobertaForMaskedLM", "RobertaConfig", encoder_text, **WIDE, **WORDS),
    "electra": build("ElectraForPreTraining", "ElectraConfig", encoder_text, **WIDE, **WORDS, embedding_size=60),
    "albert": build("AlbertForMaskedLM", "AlbertConfig", encoder_text, **WIDE, **WORDS, embedding_size=40),
    "deit": build("DeiTForImageClassification", "DeiTConfig", image(24), **VISION, num_labels=5),
    "gpt_neo": build(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        three_texts,
        hidden_size=96,
        num_heads=8,
        num_layers=2,
        intermediate_size=80,
        vocab_size=VOCAB,
        max_position_embeddings=33,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        **IDS,
    ),
}
KINDS = {**{name: seeded(name, make) for name, make in OTHERS.items()}, **ZOO}
EACH = [
    *OTHERS,
    "bert_masked_lm",
    "vit",
    "gpt2",
    "opt",
    "llama_8_4",
    "phi3",
    "olmo2",
    "mamba",
    "resnet_basic",
    "convnext",
]

RELOAD = """
import sys, torch, transformers
sys.modules.update(dict.fromkeys(("depgraph", "importance", "exporters")))
for folder in sys.argv[1:]:
    kept = torch.load(folder + ".pt")
    kind = getattr(transformers, kept["class"])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (folder, problem, info[problem])
    with torch.no_grad():
        output = model.eval()(**kept["kwargs"])
    leaves = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    assert len(leaves) == len(kept["outputs"]), folder
    for got, expected in zip(leaves, kept["outputs"]):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda text: folder + ": " + text)
"""


def traced(name: str) -> tuple[Example, depgraph.DependencyGraph]:
    example = KINDS[name]()
    return example, depgraph.trace(example.model, example.args, example.kwargs)


def plain(name: str, folder: Path, params: float = 0.8, **options: object) -> depgraph.Plan:
    """Plan, cut and save; beside the folder lies what the pruned model computes."""
    example, graph = traced(name)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=params), scope="uniform", **options)
    pruned = plan.apply_with_report()
    report = depgraph.save(pruned.model, folder)
    assert (pruned.form, report.format) == ("module", "plain"), report.why
    with torch.no_grad():
        outputs = tensors(pruned.model(*example.args, **example.kwargs))
    kept = {"class": type(example.model).__name__, "kwargs": example.kwargs, "outputs": outputs}
    torch.save(kept, f"{folder}.pt")
    return plan


def assert_loads(folder: Path) -> None:
    """Load a plain folder by its class, without this library's help, and compare."""
    kept = torch.load(f"{folder}.pt")
    model, info = getattr(transformers, kept["class"]).from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        outputs = tensors(model.eval()(**kept["kwargs"]))
    for got, expected in zip(outputs, kept["outputs"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def reload_elsewhere(*folders: Path) -> None:
    """Load plain folders in a process that can't import this library, and compare."""
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", RELOAD, *map(str, folders)]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_uniform_plans_load_without_this_library(tmp_path: Path) -> None:
    folders = []
    for name in EACH:
        plan = plain(name, tmp_path / name)
        assert plan.removal, name
        folders.append(tmp_path / name)
    reload_elsewhere(*folders)


def test_heads_and_width_go_together_where_the_class_divides_one_by_the_other(tmp_path: Path) -> None:
    config = plain("bert_masked_lm", tmp_path / "bert").config
    heads = config["num_attention_heads"]
    assert heads < 8 and config["hidden_size"] == 12 * heads
    assert_loads(tmp_path / "bert")


def test_a_setting_that_the_class_looks_up_in_vain_is_used(tmp_path: Path) -> None:
    """Qwen2's config has no head dimension, but its attention takes one."""
    config = plain("qwen2", tmp_path / "qwen2").config
    assert config["head_dim"] == 12 and config["hidden_size"] % 12


def test_widths_that_validation_refuses_are_not_planned(tmp_path: Path) -> None:
    """transformers wants the width to be a multiple of the heads, though nothing is computed from it."""
    config = plain("llama_stories", tmp_path / "stories").config
    assert config["hidden_size"] % 8 == 0
    assert_loads(tmp_path / "stories")


def test_a_width_that_scales_the_embeddings_stays(tmp_path: Path) -> None:
    """Gemma multiplies embeddings by the square root of the width in its config."""
    plan = plain("gemma3", tmp_path / "gemma3", params=0.9)
    assert "hidden_size" not in plan.config
    assert any("o_proj" in note for note in plan.notes)


def test_what_no_config_expresses_is_refused() -> None:
    """BLOOM's MLP is four times its width, whose heads have slopes that depend on how many there are."""
    _, graph = traced("bloom")
    with pytest.raises(NothingToPrune, match="no config"):
        graph.plan(random_scores(graph), depgraph.Target(params=0.8), scope="uniform")
    _, graph = traced("gemma3")
    with pytest.raises(TargetError, match=r"allow params=0\.\d+ at the least.*; no config narrows"):
        graph.plan(random_scores(graph), depgraph.Target(params=0.2), scope="uniform")


def test_options_hold(tmp_path: Path) -> None:
    _, graph = traced("qwen2")
    scores, target = random_scores(graph), depgraph.Target(params=0.9)
    rounded = graph.plan(scores, target, scope="uniform", round_to=16)
    assert rounded.config["hidden_size"] % 16 == 0 and rounded.config.get("intermediate_size", 80) % 16 == 0
    mlp = [axis for axis in graph.axes if axis.size == 80]
    only = graph.plan(scores, target, scope="uniform", only=mlp)
    assert only.config.keys() == {"intermediate_size"}
    protected = graph.plan(scores, target, scope="uniform", protect=mlp)
    assert "intermediate_size" not in protected.config
    with pytest.raises(TargetError):
        graph.plan(scores, depgraph.Target(params=0.5), scope="uniform", floor=0.9)


def test_the_config_travels_with_the_plan(tmp_path: Path) -> None:
    _, graph = traced("gpt2")
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.8), scope="uniform")
    plan.save(tmp_path / "plan.json")
    again = depgraph.Plan.load(graph, tmp_path / "plan.json")
    assert again == plan and again.config
    assert not again.without(next(iter(plan.removal))).config


@pytest.mark.ci
def test_a_uniform_plan_of_a_model_that_was_cut_before(tmp_path: Path) -> None:
    example, graph = traced("llama_8_4")
    for k in range(2):
        pruned = graph.plan(random_scores(graph), depgraph.Target(params=0.85), scope="uniform").apply(form="module")
        report = depgraph.save(pruned, tmp_path / str(k))
        assert report.format == "plain", report.why
        graph = depgraph.trace(pruned, example.args, example.kwargs)


def test_a_model_that_its_own_config_does_not_give_says_in_what() -> None:
    example = ZOO["llama_8_4"]()
    example.model.model.rotary_emb.inv_freq.mul_(0.9)
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    with pytest.raises(NothingToPrune, match=r"isn't this model \(model\.rotary_emb\.inv_freq holds other values\)"):
        graph.plan(random_scores(graph), depgraph.Target(params=0.8), scope="uniform")
