"""Torch-Pruning on one model, with the settings of its own examples (prune_llm.py, prune_hf_vit.py) for such models.

It is told the heads and what to leave alone, which this library isn't; the attributes that its examples mend by hand
afterwards are mended here, outside of the time that is counted.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch_pruning
from torch import nn

from benchmarks.measuring import Stopwatch, forward_seconds, parameters, resident, tiny
from benchmarks.models import Case


def warm_up() -> None:
    """Prune a tiny model."""
    model, args = tiny()
    _pruner(model, args, 0.5, {}).step()


def prune(case: Case, share: float) -> dict[str, Any]:
    """Remove the share `share` of the channels of every layer in one step; the phases, and what came of it."""
    forward, dense = forward_seconds(case.model, case.args), parameters(case.model)
    base, watch = resident(), Stopwatch()
    graph = torch_pruning.DependencyGraph
    original = graph.build_dependency

    def timed(*args: Any, **kwargs: Any) -> Any:
        inner = Stopwatch()
        with inner.phase("build"):
            found = original(*args, **kwargs)
        watch.phases.update(inner.phases)
        return found

    graph.build_dependency = timed
    try:
        with watch.phase("pruner"):
            pruner = _pruner(case.model, case.args, share, _settings(case, share))
        with watch.phase("step"):
            for group in pruner.step(interactive=True):
                group.prune()
    finally:
        graph.build_dependency = original
    _mend(case.model, pruner)
    result = {"forward": forward, "base": base, "kept": parameters(case.model) / dense}
    return {**result, "phases": watch.phases, "runs": _runs(case)}


def _pruner(model: nn.Module, args: tuple[torch.Tensor, ...], share: float, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.pruner.MetaPruner(
            model,
            example_inputs=args[0],
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=share,
            **settings,
        )


def _settings(case: Case, share: float) -> dict[str, Any]:
    """What its examples pass for such a model: the heads, the head to ignore, how to read the output."""
    model = case.model
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        projections = [getattr(module, f"{name}_proj", None) for name in "qkv"]
        if all(isinstance(p, nn.Linear) for p in projections):
            queries = config.num_attention_heads
            values = getattr(config, "num_key_value_heads", queries)
            heads |= dict(zip(projections, (queries, values, values), strict=True))
    last = [
        m
        for name, m in model.named_modules()
        if name.startswith(("lm_head", "classifier")) and isinstance(m, nn.Linear)
    ]
    settings: dict[str, Any] = {"ignored_layers": last, "num_heads": heads, "output_transform": lambda out: out.logits}
    if case.kind == "text":
        settings |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": share, "round_to": 4}
    return settings


def _mend(model: nn.Module, pruner: Any) -> None:
    """The integers that its examples set by hand after the cut."""
    for module in model.modules():
        query, key = getattr(module, "q_proj", None), getattr(module, "k_proj", None)
        if query not in pruner.num_heads:
            continue
        heads = pruner.num_heads[query]
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = query.out_features // key.out_features
        for name, value in {
            "num_attention_heads": heads,
            "num_heads": heads,
            "head_dim": query.out_features // heads,
            "attention_head_size": query.out_features // heads,
            "all_head_size": query.out_features,
        }.items():
            if hasattr(module, name):
                setattr(module, name, value)


def _runs(case: Case) -> bool:
    try:
        with torch.no_grad():
            case.model(*case.args)
    except Exception:
        return False
    return True
