"""What keeps weights in another form than dense tensors: quantised, sparse, distributed, or packed out of sight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def form_of(tensor: torch.Tensor) -> str:
    """What a tensor is instead of dense; empty for a dense one."""
    if isinstance(tensor, DTensor) or isinstance(tensor.data, DTensor):
        return "distributed (DTensor)"
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    return ""


def packed_modules(model: nn.Module) -> Iterator[str]:
    """`module 'x' is quantised` for every module whose state has packed or quantised weights besides its parameters."""
    found: dict[str, None] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        odd = value.is_quantized if isinstance(value, torch.Tensor) else "_packed" in key
        if odd:
            found[key.rpartition(".")[0].partition("._packed")[0]] = None
    yield from (f"module {name!r} is quantised" for name in found)


def not_dense(model: nn.Module) -> Iterator[str]:
    """`parameter 'x' is sparse (...)` and the like, for all that isn't dense."""
    named = {"parameter": model.named_parameters(), "buffer": model.named_buffers()}
    for kind, tensors in named.items():
        yield from (f"{kind} {name!r} is {form_of(tensor)}" for name, tensor in tensors if form_of(tensor))
    yield from packed_modules(model)
