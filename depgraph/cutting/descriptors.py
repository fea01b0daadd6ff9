"""Integers of standard torch.nn classes that only describe a weight: they follow its shape.

Attributes that take part in the computation follow by their expressions (`expressing`); these do not take part, and are
kept true for the reader, for `repr`, and for tools that look at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Undo = Callable[[], None]
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_InstanceNorm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

Described = dict[str, Callable[[nn.Module], int]]


def _size(name: str, dim: int) -> Callable[[nn.Module], int]:
    return lambda module: getattr(module, name).shape[dim]


def _times_groups(name: str, dim: int) -> Callable[[nn.Module], int]:
    return lambda module: getattr(module, name).shape[dim] * module.groups


def _projected(module: nn.Module) -> int:
    """The width of an LSTM's projected state, 0 where it isn't projected."""
    projection = getattr(module, "weight_hr_l0", None)
    return 0 if projection is None else int(projection.shape[0])


def _units(module: Any) -> int:
    """The units of a recurrent layer: its weights have a row for every unit of each gate."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    return int(module.weight_hh_l0.shape[0]) // gates


_TABLE: list[tuple[tuple[type[nn.Module], ...], Described]] = [
    ((nn.Linear,), {"in_features": _size("weight", 1), "out_features": _size("weight", 0)}),
    ((nn.Bilinear,), {"out_features": _size("weight", 0), "in1_features": _size("weight", 1), "in2_features": _size("weight", 2)}),
    (_Conv, {"in_channels": _times_groups("weight", 1), "out_channels": _size("weight", 0)}),
    (_Transposed, {"in_channels": _size("weight", 0), "out_channels": _times_groups("weight", 1)}),
    (_BatchNorm, {"num_features": _size("weight", 0)}),
    (_InstanceNorm, {"num_features": _size("weight", 0)}),
    ((nn.GroupNorm,), {"num_channels": _size("weight", 0)}),
    ((nn.Embedding, nn.EmbeddingBag), {"num_embeddings": _size("weight", 0), "embedding_dim": _size("weight", 1)}),
    ((nn.PReLU,), {"num_parameters": _size("weight", 0)}),
    ((nn.RNNBase,), {"input_size": _size("weight_ih_l0", 1), "hidden_size": _units, "proj_size": _projected}),
    ((nn.RNNCellBase,), {"input_size": _size("weight_ih", 1), "hidden_size": _size("weight_hh", 1)}),
]  # fmt: skip


def follow(model: nn.Module, undo: list[Undo]) -> None:
    """Set the describing integers of all standard layers of `model` from their weights; what takes it back is added to `undo`."""
    for module, described in _described(model):
        for name, size in described.items():
            _set(module, name, size(module), undo)


def _described(model: nn.Module) -> Iterator[tuple[nn.Module, Described]]:
    """The standard layers of a model that have weights, each with what says its sizes."""
    for module in model.modules():
        for classes, described in _TABLE:
            if isinstance(module, classes) and _has_weight(module):
                yield module, described


def flatten(model: nn.Module) -> None:
    """Let recurrent layers lay their weights out in one piece of memory again, and know them again, as when they were made."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def _has_weight(module: nn.Module) -> bool:
    held = [getattr(module, name, None) for name in ("weight", "weight_ih_l0", "weight_ih")]
    return any(isinstance(weight, torch.Tensor) for weight in held)


def _set(module: nn.Module, name: str, value: int, undo: list[Undo]) -> None:
    before = getattr(module, name)
    if before != value:
        setattr(module, name, value)
        undo.append(lambda: setattr(module, name, before))
