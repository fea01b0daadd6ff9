"""Values that make an exactness check mean something.

Freshly made models have norm weights of one, biases and class tokens of zero, layer scales of 1e-6 and running
statistics that nothing has moved. Zeroing a channel of such a model may move its output by nothing, and then "pruned
equals zeroed" proves nothing. :func:`randomise` gives every trained value and every batch statistic a size at which it
matters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Uses = list[tuple[nn.Module, str]]

TABLE_WORDS = ("pos", "token", "embed", "table")


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Overwrite the floating-point parameters and batch statistics of ``model`` in place; returns ``model``.

    Untouched: integer buffers, and float buffers that aren't batch statistics (rotary frequencies, masks, scales).
    The same seed gives the same values; parameters that are tied stay tied.
    """
    generator = torch.Generator().manual_seed(seed)
    uses: dict[int, Uses] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses.setdefault(id(parameter), []).append((module, name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(_parameter(parameter, uses[id(parameter)], generator))
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(_normal(module.running_mean, 0.3, generator))
                module.running_var.copy_(_uniform(module.running_var, 0.5, generator))
    return model


def _parameter(parameter: Tensor, uses: Uses, generator: torch.Generator) -> Tensor:
    owner, name = uses[0]
    deviation = _weight_deviation(parameter, uses)
    if deviation is not None:
        return _normal(parameter, deviation, generator)
    if parameter.ndim <= 1 and "bias" in name:
        return _normal(parameter, 0.2, generator)
    if parameter.ndim >= 2 and any(word in name.lower() for word in TABLE_WORDS):
        return _normal(parameter, 0.5, generator)
    first = parameter.flatten()[0]
    if bool((parameter == first).all()) or "norm" in type(owner).__name__.lower():
        # A norm that multiplies by 1 + weight starts from zeros, all others and the layer scales from a constant.
        centre = 1.0 if bool(first != 0) else 0.0
        return _uniform(parameter, centre - 0.5, generator)
    return parameter + _normal(parameter, 0.1, generator)


def _weight_deviation(parameter: Tensor, uses: Uses) -> float | None:
    """The standard deviation at which a matrix or kernel keeps the variance of what it maps; None for anything else."""
    if parameter.ndim < 2:
        return None
    owner = uses[0][0]
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return 1.0 if len(uses) == 1 else 2.0 / math.sqrt(parameter.shape[1])
    if isinstance(owner, _ConvTransposeNd):
        fan_in = parameter[:, 0].numel() / math.prod(owner.stride) / owner.groups
        return math.sqrt(2.0 / fan_in)
    if isinstance(owner, _ConvNd):
        return math.sqrt(2.0 / parameter[0].numel())
    if type(owner).__name__ == "Conv1D":  # a Linear with its weight transposed
        return 1.0 / math.sqrt(parameter.shape[0])
    if uses[0][1].endswith("weight"):
        return 1.0 / math.sqrt(parameter[0].numel())
    return None


def _normal(like: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return deviation * torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)


def _uniform(like: Tensor, low: float, generator: torch.Generator) -> Tensor:
    """Uniform in [low, low + 1]."""
    return low + torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)
