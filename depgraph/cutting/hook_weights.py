"""Weights that torch's own hooks compute from other parameters before every forward: the older weight and spectral norms, masks.

Such a weight is a plain tensor attribute, which nothing narrows; computed again it has the new shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from depgraph.capture.restoring import tensors_held
from depgraph.offloading import own_copy

_TABLE: dict[type, Callable[[Any, nn.Module], tuple[str, torch.Tensor]]] = {
    WeightNorm: lambda hook, module: (hook.name, hook.compute_weight(module)),
    SpectralNorm: lambda hook, module: (hook.name, hook.compute_weight(module, do_power_iteration=False)),
    BasePruningMethod: lambda hook, module: (hook._tensor_name, hook.apply_mask(module)),
}
"""What each kind of hook sets: the name, and the tensor from the parameters that its module has now."""


def plain_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy as `own_copy` makes it, also of a model that holds what was computed with gradients."""
    return own_copy(model, {**_without_history(model), **memo})


def _without_history(model: nn.Module) -> dict[int, torch.Tensor]:
    """By identity, a plain copy of what was computed with gradients, such weights and what a forward has left behind.

    torch doesn't copy tensors that remember how they were made.
    """
    return {id(tensor): tensor.detach().clone() for tensor in tensors_held(model) if tensor.grad_fn is not None}


@torch.no_grad()
def compute_again(model: nn.Module) -> None:
    """Every computed weight from the parameters that its module has now; what spectral norm has estimated stays."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            for compute in (compute for kind, compute in _TABLE.items() if isinstance(hook, kind)):
                setattr(module, *compute(hook, module))
