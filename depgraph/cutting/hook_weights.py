"""Weights that torch's own hooks compute from other parameters before every forward: the older weight and spectral norms.

Such a weight is a plain tensor attribute, which nothing narrows; computed again it has the new shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def _hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                yield module, hook


def without_history(model: nn.Module) -> dict[int, torch.Tensor]:
    """By identity, a plain copy of every computed weight: torch doesn't copy tensors that remember how they were made."""
    held = [getattr(module, hook.name) for module, hook in _hooks(model)]
    return {id(tensor): tensor.detach().clone() for tensor in held}


def compute_again(model: nn.Module) -> None:
    """Every computed weight from the parameters that its module has now; what spectral norm has estimated stays."""
    for module, hook in _hooks(model):
        with torch.no_grad():
            more = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
            setattr(module, hook.name, hook.compute_weight(module, **more))
