"""Small modules, and tiny random models of transformers, whose sizes the recording is tested on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Config:
    """A config-like object with an integer and a nested config."""

    def __init__(self) -> None:
        self.num_heads = 4
        self.dropout = 0.0
        self.name = "small"
        self.use_bias = True
        self.inner = SimpleNamespace(ratio=2)


class Attention(nn.Module):
    """Attention with an explicit head size, sizes from a config that it shares with others."""

    def __init__(self, config: Config, width: int = 16) -> None:
        super().__init__()
        self.config = config
        self.head_dim = width // config.num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.size()
        q = self.q(x).view(b, s, self.config.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(b, s, 2, self.config.num_heads, x.shape[2] // self.config.num_heads).unbind(2)
        scores = q @ k.permute(0, 2, 3, 1) * self.head_dim**-0.5
        mixed = scores.softmax(-1) @ v.transpose(1, 2)
        return self.out(mixed.transpose(1, 2).reshape(b, s, -1))


class Mixture(nn.Module):
    """Sizes in tuples, lists and dicts, of the class, and in standard modules; a fused projection that is split."""

    patch = 2

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.first = Attention(self.config)
        self.second = Attention(self.config)
        self.splits = (4, 12)
        self.folds = [2, 8]
        self.sizes = {"half": 8}
        self.conv = nn.Conv2d(16, 16, 3, stride=(1, 1), padding="same", groups=4)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        a, b = x.split(self.splits, dim=-1)
        x = torch.cat([b, a], dim=-1)
        x = torch.cat([x[..., self.sizes["half"] :], x[..., : self.sizes["half"]]], dim=-1)
        n, s, c = x.shape
        image = x.transpose(1, 2).view(n, c, self.patch, s // self.patch)
        x = self.norm(self.conv(image)).flatten(2).transpose(1, 2)
        x = x.unflatten(-1, (self.folds[0], self.folds[1])).flatten(-2)
        return F.layer_norm(x, self.last.normalized_shape) * self.config.inner.ratio


TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = ("llama", "gpt2", "bert", "vit", "swin", "t5", "phi3", "mamba")


def tiny(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny random transformers model of `family` in eval mode, and keyword arguments for its forward."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **_OPTIONS[family])
    vision = family in ("vit", "swin")
    causal = family in ("llama", "gpt2", "phi3", "mamba")
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    ids = torch.arange(16).reshape(2, 8)
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 32, 32)} if vision else {"input_ids": ids}
    if family == "t5":
        inputs["decoder_input_ids"] = ids
    if causal or family == "t5":
        inputs["use_cache"] = False
    return kind.from_config(config).eval(), inputs


_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {**TEXT, **TOKENS, "intermediate_size": 48, "num_key_value_heads": 2},
    "phi3": {**TEXT, **TOKENS, "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    "bert": {**TEXT, "intermediate_size": 48},
    "vit": {**TEXT, "intermediate_size": 48, "image_size": 32, "patch_size": 8},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "t5": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, **TOKENS},
}
