"""What every process of the zoo starts with: all that is imported on the first use, by pruning one tiny model."""

from __future__ import annotations

import gc
import sys
import tempfile
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import zoo_stages  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

torch.set_num_threads(1)
warnings.filterwarnings("ignore")


def warm() -> None:
    """Trace, cut, save and export a language model of two thousand parameters."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        built = zoo_stages.Built(LlamaForCausalLM(config).eval(), {"input_ids": torch.ones(2, 4, dtype=torch.long)}, 0)
        for _ in zoo_stages.steps(built, Path(folder), True):
            pass


warm()
gc.freeze()
