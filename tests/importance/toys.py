"""Graphs of one's own making: axes given by hand on the parameters of a small module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depgraph import Axis, Member


@dataclass
class HandGraph:
    """What estimators use of a DependencyGraph, with axes that a test writes down."""

    model: nn.Module
    axes: list[Axis]
    steps_first: frozenset[str] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        model = self.model
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return dict(named)


def member(target: str, dim: int, labels: list[int], kind: str = "parameter") -> Member:
    return Member(target, dim, kind, np.array(labels))


def axis(name: str, *members: Member) -> Axis:
    size = 1 + max(int(m.labels.max()) for m in members)
    return Axis(name, size, members, {}, (), {})


def hand_graph(model: nn.Module, *axes: Axis) -> Any:
    return HandGraph(model, list(axes))


class Weights(nn.Module):
    """Parameters by name and no inputs to speak of: what the loss does with them is the test's business."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))

    def forward(self, scale: Tensor) -> dict[str, Tensor]:
        return {name: parameter * scale for name, parameter in self.named_parameters()}


def linear_loss(**gradients: Any) -> Any:
    """A loss whose gradient with respect to the named parameters is what is given, times the batch."""
    wanted = {name: torch.tensor(value) for name, value in gradients.items()}
    return lambda output, batch: sum((output[name] * gradient).sum() for name, gradient in wanted.items())


def regression() -> tuple[nn.Module, list[Any], Callable[[Tensor, Any], Tensor]]:
    """A model with dropout, batches of inputs and targets, and their loss."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    batches = [(torch.randn(4, 5), torch.randn(4, 3)) for _ in range(3)]
    return model, batches, lambda output, batch: F.mse_loss(output, batch[1])
