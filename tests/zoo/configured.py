"""Models of transformers from a configuration, and the inputs that their users give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from .example import Builder, Example

VOCAB, LABELS, TOKENS = 101, 5, 7
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Inputs = Callable[[], dict[str, torch.Tensor]]


def text(batch: int = 2, tokens: int = TOKENS, padding: str = "left") -> dict[str, torch.Tensor]:
    """Token ids and a mask in which the last sequence is shorter by two, padded on the given side."""
    input_ids = torch.randint(3, VOCAB, (batch, tokens))
    attention_mask = torch.ones_like(input_ids)
    padded = slice(0, 2) if padding == "left" else slice(tokens - 2, tokens)
    input_ids[-1, padded] = 0
    attention_mask[-1, padded] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def encoder_text() -> dict[str, torch.Tensor]:
    return text(padding="right")


def bert_text() -> dict[str, torch.Tensor]:
    inputs = text(padding="right")
    return {**inputs, "token_type_ids": (torch.arange(TOKENS) > 3).long().expand_as(inputs["input_ids"]).clone()}


def three_texts() -> dict[str, torch.Tensor]:
    """A batch of three, for models in which two already means something else."""
    return text(batch=3)


def text_pair() -> dict[str, torch.Tensor]:
    """Nine source tokens and seven target tokens."""
    return {**text(tokens=9, padding="right"), "decoder_input_ids": torch.randint(3, VOCAB, (2, TOKENS))}


def image(side: int) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, 3, side, side)}


def speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 20, 30), "decoder_input_ids": torch.randint(3, VOCAB, (2, TOKENS))}


def text_and_image() -> dict[str, torch.Tensor]:
    inputs = text(batch=3, padding="right")
    inputs["input_ids"][:, 4] = IDS["eos_token_id"]
    return {**inputs, "pixel_values": torch.randn(2, 3, 24, 24)}


def build(model: str, config: str, inputs: Inputs, **settings: Any) -> Builder:
    """A builder of ``transformers.<model>`` from ``transformers.<config>(**settings)``."""

    def make() -> Example:
        configuration = getattr(transformers, config)(**settings)
        if hasattr(configuration, "use_cache"):
            configuration.use_cache = False
        return Example(getattr(transformers, model)(configuration), (), inputs())

    return make
