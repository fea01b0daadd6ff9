"""The key-value cache of a decoder as named tensors: what a real forward puts into it, taken apart and put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.errors import ExportError, first_line

Pair = dict[str, Tensor]
"""`key` and `value` of one layer, each [batch, heads, length, width]."""


@dataclass(frozen=True)
class CacheEntry:
    """What one layer keeps for every token.

    Attributes:
        layer: Its number in the model's own cache; layers without attention have no entry.
        heads: Of keys and values.
        key_width: Elements of one head's key.
        value_width: Elements of one head's value.
        window: How many tokens back the layer looks; None: all.
    """

    layer: int
    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    window: int | None = None

    def random(self, batch: int, length: int, device: torch.device) -> Pair:
        """A key and a value of that many tokens."""
        generator = torch.Generator().manual_seed(self.layer)
        shapes = {"key": self.key_width, "value": self.value_width}
        return {
            name: torch.randn(batch, self.heads, length, width, generator=generator).to(device, self.dtype)
            for name, width in shapes.items()
        }


class Around(nn.Module):
    """A model within a module of other inputs and outputs; the file has the weights' names as the model has them."""

    weight_prefix = "model.model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        record = getattr(model, "depgraph_record", None)
        if record is not None:
            self.depgraph_record = record


def on_device(model: nn.Module, **tensors: Tensor) -> dict[str, Tensor]:
    """The tensors where the model's weights are."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def cache_entries(cache: Any, owner: str) -> tuple[CacheEntry, ...]:
    """The entries of a cache that a forward has filled.

    Raises:
        ExportError: It isn't keys and values only.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # takes seconds

    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ExportError(
            f"{owner} keeps {type(cache).__name__} and no cache of keys and values between tokens, which this export can't "
            "hold: export one whole forward with to_onnx instead."
        )
    odd = [
        (i, type(layer).__name__)
        for i, layer in enumerate(layers)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    ]
    if odd:
        raise ExportError(
            f"Layer {odd[0][0]} of {owner} keeps a state ({odd[0][1]}) that is no plain keys and values, which this export "
            "can't hold: export one whole forward with to_onnx instead."
        )
    filled = [(i, layer) for i, layer in enumerate(layers) if layer.keys is not None and layer.keys.numel()]
    if not filled:
        raise ExportError(f"{owner} put nothing into its cache, so there is none to export: use to_onnx.")
    return tuple(_entry(i, layer) for i, layer in filled)


def _entry(number: int, layer: Any) -> CacheEntry:
    return CacheEntry(
        number,
        layer.keys.shape[1],
        layer.keys.shape[3],
        layer.values.shape[3],
        layer.keys.dtype,
        getattr(layer, "sliding_window", None),
    )


def filled(entries: Sequence[CacheEntry], pairs: Sequence[Mapping[str, Tensor]]) -> Any:
    """A cache that holds these keys and values, all of them: masks do what windows do."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for entry, pair in zip(entries, pairs, strict=True):
        cache.update(pair["key"], pair["value"], entry.layer)
    return cache


def pairs_of(entries: Sequence[CacheEntry], cache: Any) -> list[Pair]:
    """What the cache holds for each entry."""
    layers = [cache.layers[entry.layer] for entry in entries]
    return [{"key": layer.keys, "value": layer.values} for layer in layers]


def probed(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The output of one forward of `model` that is asked for its cache.

    Raises:
        ExportError: It fails, or gives no cache.
    """
    owner = type(model).__name__
    try:
        output: Any = model(**inputs, use_cache=True)
    except Exception as error:
        raise ExportError(
            f"{owner} doesn't run with {', '.join(inputs)} and use_cache=True ({first_line(error)}), as a decoder with a "
            "cache does: export it with to_onnx, or give another prompt."
        ) from error
    if getattr(output, "past_key_values", None) is None:
        raise ExportError(f"{owner} returns no `past_key_values`, so it has no cache to export: use to_onnx.")
    return output
