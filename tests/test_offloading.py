"""Models whose weights accelerate has put on disk or into the CPU's memory: scored and cut without loading them whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import depgraph
import importance
from depgraph.errors import CutError, ScoreError
from depgraph.offloading import offloaded

accelerate = pytest.importorskip("accelerate")


def _llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).eval()


INPUTS = {"input_ids": torch.arange(32).view(2, 16)}


def _away(model: nn.Module, where: str, folder: Path) -> nn.Module:
    if where == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    return accelerate.cpu_offload(model, execution_device="cpu")


@pytest.fixture(params=["disk", "cpu"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """A model with its weights elsewhere, and the same with them at hand."""
    model = _llama()
    return _away(copy.deepcopy(model), request.param, tmp_path), model


def test_it_is_scored_and_cut_as_if_it_were_at_hand(pair: tuple[nn.Module, nn.Module]) -> None:
    away, whole = pair
    graphs = [depgraph.trace(model, (), INPUTS) for model in pair]
    assert all(p.is_meta for p in away.parameters()) and not graphs[0].on_meta
    for score in ("magnitude", "wanda-sp", "obs"):
        scorer = importance.named(score, batches=[INPUTS])
        first, second = (graph.plan(scorer, depgraph.Target(params=0.7)) for graph in graphs)
        assert first.removal == second.removal
    report = first.apply_with_report()
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity
    made, expected = report.model(**INPUTS).logits, second.apply()(**INPUTS).logits
    assert torch.equal(made, expected)
    assert not offloaded(report.model) and not any("_hf_hook" in vars(m) for m in report.model.modules())
    assert torch.equal(away(**INPUTS).logits, whole(**INPUTS).logits) and all(p.is_meta for p in away.parameters())


def test_what_makes_up_for_the_cut_changes_the_smaller_model(pair: tuple[nn.Module, nn.Module]) -> None:
    recipe = importance.recipes.flap([INPUTS])
    pruned = [recipe.prune(depgraph.trace(model, (), INPUTS), depgraph.Target(params=0.7)) for model in pair]
    assert torch.equal(pruned[0].model(**INPUTS).logits, pruned[1].model(**INPUTS).logits)


def test_depth_goes_too(pair: tuple[nn.Module, nn.Module]) -> None:
    graphs = [depgraph.trace(model, (), INPUTS) for model in pair]
    shorter = [graph.cut_plan(branches=[graph.branches[1].name]).apply() for graph in graphs]
    assert torch.equal(shorter[0](**INPUTS).logits, shorter[1](**INPUTS).logits)
    found = [importance.depth.BlockInfluence([INPUTS])(graph) for graph in graphs]
    assert found[0] == found[1]


def test_tied_weights_are_tied_in_the_smaller_model(tmp_path: Path) -> None:
    away = _away(_llama(tie_word_embeddings=True), "disk", tmp_path)
    graph = depgraph.trace(away, (), INPUTS)
    smaller = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply()
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight


def test_what_offloaded_weights_cant_do_is_said(pair: tuple[nn.Module, nn.Module]) -> None:
    graph = depgraph.trace(pair[0], (), INPUTS)
    with pytest.raises(
        ScoreError, match="needs gradients, which LlamaForCausalLM doesn't give while its weights are off"
    ):
        graph.plan(importance.Taylor([INPUTS]), depgraph.Target(params=0.7))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))
    with pytest.raises(CutError, match=r"can't be cut in place, as its weights are offloaded: use plan.apply\(\)"):
        plan.apply_()
    assert all(p.is_meta for p in pair[0].parameters())


def test_a_weight_is_read_only_while_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = _away(_llama(), "disk", tmp_path)
    alive, most = 0, 0
    graph = depgraph.trace(away, (), INPUTS)

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    real = depgraph.offloading.offloaded

    def counting(model: nn.Module) -> dict[str, Any]:
        def read(one: Any) -> Any:
            nonlocal alive, most
            alive, most = alive + 1, max(most, alive + 1)
            return one().as_subclass(Counted)

        return {name: lambda one=one: read(one) for name, one in real(model).items()}

    monkeypatch.setattr(depgraph.dependency, "offloaded", counting)
    importance.collect(graph, [INPUTS], [importance.Norms()])
    assert 0 < most <= 4 < len(real(away))
