"""Small random language models that the tests of this folder export."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 60
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}


def seeded(model: str, config: str, **settings: Any) -> Any:
    """A model whose tokens vary: weights are larger than they are initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
        for parameter in made.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return made


def llama(layers: int = 1, kv_heads: int = 2, **settings: Any) -> Any:
    sizes = {**SIZES, "num_key_value_heads": kv_heads, "num_hidden_layers": layers, **settings}
    return seeded("LlamaForCausalLM", "LlamaConfig", **sizes)


def uneven_llama() -> Any:
    """The first of two layers has two of four heads left."""
    model = llama(2, kv_heads=4)
    attention, width = model.model.layers[0].self_attn, 2 * 6
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(attention, name)
            linear.weight = nn.Parameter(linear.weight[:width].clone())
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :width].clone())
    return model


def gpt2() -> Any:
    return seeded("GPT2LMHeadModel", "GPT2Config", n_embd=24, n_layer=2, n_head=4, n_positions=64, **IDS)


def left_padded_prompt() -> tuple[Tensor, Tensor]:
    """Ids and mask of three sequences of seven, five and two tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        ids = torch.randint(3, VOCABULARY, (3, 7))
    mask = torch.arange(7).expand(3, -1) >= torch.tensor([[0], [2], [5]])
    return ids * mask, mask.long()
