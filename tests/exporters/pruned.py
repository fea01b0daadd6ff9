"""Models pruned by this library, to export: odd widths, and layers that differ."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

import depgraph
import importance

LLAMA = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
IDS = torch.arange(9)[None] * 5 % 50


def cnn() -> tuple[nn.Module, Tensor]:
    """Convolutions of odd widths with a batch norm that has statistics of its own, and an example."""
    norm = nn.BatchNorm2d(12)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    body = nn.Conv2d(3, 12, 3), norm, nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU()
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)).eval()
    example = torch.randn(2, 3, 8, 8)
    graph = depgraph.trace(model, example)
    pruned = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply()
    assert pruned[0].out_channels % 2 or pruned[3].out_channels % 2
    return pruned, example


def vit() -> tuple[nn.Module, Tensor]:
    """A vision transformer that gives its logits, and an example."""
    small = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(**small, image_size=8, patch_size=4, num_labels=3)
    return pruned(transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 8, 8), 0.6)


def llama(keep: float = 1.0, **options: object) -> transformers.LlamaForCausalLM:
    """A Llama with fewer key-value heads than heads, pruned to a share of its parameters."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    return model if keep == 1 else pruned(model, IDS, keep, **options)[0]  # type: ignore[return-value]


def pruned(model: nn.Module, example: Tensor, keep: float, **options: object) -> tuple[nn.Module, Tensor]:
    """The model cut to a share of its parameters."""
    graph = depgraph.trace(model, example)
    return graph.plan(importance.Magnitude(), depgraph.Target(params=keep), **options).apply(), example


def without(model: nn.Module, *branches: str) -> nn.Module:
    """A language model without some of its attentions and MLPs."""
    return depgraph.trace(model, IDS).cut_plan(branches=list(branches)).apply()
