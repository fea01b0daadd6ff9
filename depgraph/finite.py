"""Weights must be numbers: with NaN or infinity among them no score, check or exported file means anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from depgraph.errors import DepgraphError


def require_finite(model: nn.Module, error: type[DepgraphError]) -> None:
    """Raise `error` for the first parameter with NaN or infinite values, or buffer with NaN (a mask may be infinite).

    Costs one pass over the weights and no memory; what has no values (the meta device), isn't dense or holds integers is
    left out.
    """
    for name, parameter in model.named_parameters():
        if _has(parameter, torch.isfinite):
            raise error(f"parameter {name!r} holds NaN or infinite values: repair or reload the weights")
    for name, buffer in model.named_buffers():
        if _has(buffer, _is_number):
            raise error(f"buffer {name!r} holds NaN: repair or reload the weights")


def _is_number(tensor: torch.Tensor) -> torch.Tensor:
    return ~torch.isnan(tensor)


def _has(tensor: torch.Tensor, good: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Is a value of the tensor not good? A sum is finite if all are, so that only a sum that isn't is looked into."""
    dense = type(tensor.data) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_meta
    wide = (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype.itemsize > 1
    if not (dense and wide) or bool(torch.isfinite(tensor.detach().sum())):
        return False
    return not bool(good(tensor.detach()).all())
