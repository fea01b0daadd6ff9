"""The models that are measured: random weights, shapes of published ones, one small batch of example inputs each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

logging.set_verbosity_error()
TOKENS = 16
VOCABULARY = 32000


@dataclass(frozen=True)
class Case:
    """A model in eval mode and the example inputs of one call."""

    model: nn.Module
    args: tuple[torch.Tensor, ...]
    kind: str


def _image(model: nn.Module) -> Case:
    return Case(model.eval(), (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),), "image")


def _resnet() -> Case:
    return _image(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)))


def _vit() -> Case:
    return _image(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)))


def _convnext() -> Case:
    return _image(transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=1000)))


def llama(layers: int, device: str = "cpu", **shape: Any) -> Case:
    """A Llama of `layers` layers: hidden 512, 8 query and 2 KV heads, MLP of 1408, 32000 words, unless `shape` says otherwise."""
    settings = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1408,
        "vocab_size": VOCABULARY,
        **shape,
    }
    config = transformers.LlamaConfig(num_hidden_layers=layers, use_cache=False, **settings)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
        ids = torch.arange(TOKENS).reshape(1, TOKENS)
    return Case(model.eval(), (ids,), "text")


def llama_1b() -> Case:
    """The shape of Llama-3.2-1B with tied embeddings, in float32: 4.9 GB."""
    return llama(
        16,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        tie_word_embeddings=True,
    )


def llama_70b() -> Case:
    """The shape of Llama-3-70B on the meta device, without weights."""
    return llama(
        80,
        "meta",
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    )


def deep(layers: int) -> Case:
    """A narrow Llama (hidden 128, 4 query and 2 KV heads), for time against depth."""
    return llama(
        layers, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=352, vocab_size=1000
    )


MODELS: dict[str, Callable[[], Case]] = {
    "resnet-50": _resnet,
    "vit-b16": _vit,
    "convnext-t": _convnext,
    "llama-4": lambda: llama(4),
    "llama-16": lambda: llama(16),
    "llama-32": lambda: llama(32),
    "llama-1b": llama_1b,
}
