"""A GGUF file of a Llama-like model, read anew and run in float32: a second opinion that shares nothing with the writing.

Everything comes out of the file: numbers from its metadata, weights dequantised by the `gguf` package; what is computed with
them is what llama.cpp documents for these architectures.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from exporters.extras import required


class GgufModel:
    """Runs a GGUF file; raises what the `gguf` package raises where the file can't be read, KeyError where it lacks something."""

    def __init__(self, path: Path) -> None:
        gguf = required("gguf", "gguf")
        reader = gguf.GGUFReader(path)
        self.facts: Mapping[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        self.tensors = {t.name: _dequantised(gguf, t) for t in reader.tensors}

    def of(self, tensors: dict[str, Tensor]) -> GgufModel:
        """The same model of other tensors."""
        other = copy.copy(self)
        other.tensors = tensors
        return other

    def fact(self, name: str) -> Any:
        """A number that the file's architecture has, such as "attention.head_count"."""
        return self.facts[f"{self.facts['general.architecture']}.{name}"]

    def of_layer(self, name: str, layer: int) -> int:
        """Such a number of one layer."""
        found = self.fact(name)
        return int(found[layer] if isinstance(found, list) else found)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] for token ids [batch, length]."""
        x = self.tensors["token_embd.weight"][ids]
        for layer in range(self.fact("block_count")):
            place = f"blk.{layer}"
            if self.of_layer("attention.head_count", layer):
                x = x + self._attention(place, layer, self._normed(f"{place}.attn_norm", x))
            if self.of_layer("feed_forward_length", layer):
                read = self._normed(f"{place}.ffn_norm", x)
                gate, up = (self._product(f"{place}.ffn_{name}", read) for name in ("gate", "up"))
                x = x + self._product(f"{place}.ffn_down", F.silu(gate) * up)
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self._normed("output_norm", x) @ head.T

    def _product(self, place: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{place}.weight"], self.tensors.get(f"{place}.bias"))

    def _normed(self, place: str, x: Tensor) -> Tensor:
        eps = self.fact("attention.layer_norm_rms_epsilon")
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * self.tensors[f"{place}.weight"]

    def _attention(self, place: str, layer: int, x: Tensor) -> Tensor:
        width = self.fact("attention.key_length")
        q, k, v = (self._product(f"{place}.attn_{n}", x).unflatten(-1, (-1, width)).transpose(1, 2) for n in "qkv")
        shared = self.of_layer("attention.head_count", layer) // self.of_layer("attention.head_count_kv", layer)
        k, v = (t.repeat_interleave(shared, 1) for t in (self._turned(k), v))
        scores = self._turned(q) @ k.transpose(-1, -2) / width**0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        made = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self._product(f"{place}.attn_output", made.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor) -> Tensor:
        """Neighbouring channels of heads [batch, heads, length, channels] turned by their positions."""
        size = self.fact("rope.dimension_count")
        frequencies = self.fact("rope.freq_base") ** (-torch.arange(0, size, 2) / size)
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.tensors["rope_freqs.weight"]
        angles = torch.arange(x.shape[2])[:, None] * frequencies
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(turned, -1).flatten(-2)


def _dequantised(gguf: Any, tensor: Any) -> Tensor:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(tuple(int(n) for n in tensor.shape[::-1]))
