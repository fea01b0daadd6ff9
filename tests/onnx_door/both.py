"""One network behind both doors: convolutions, then blocks of attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from tests.onnx_door.exporting import exported
from tests.zoo.example import Example
from tests.zoo.randomise import randomise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        x = x + self.o(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 16, 1)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(F.relu(self.depthwise(F.relu(self.norm(self.conv(x))))))
        x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@dataclass
class Doors:
    """The network, its file, and the graph that each gives; batches of its size, in torch and as a file takes them."""

    model: nn.Module
    path: Path
    module: Any
    file: Any
    batches: list[Tensor]

    def run(self, model: Any, batch: Tensor) -> Tensor:
        """What a file cut from this one gives."""
        found: Tensor = self.file.again(model).observer().call(((), {"x": batch}))
        return found


def both(folder: Path) -> Doors:
    """The network, randomised, through both doors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, batches = Both().eval(), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    randomise(model, 5)
    path = exported(Example(model, (batches[0],)), folder / "both.onnx", input_names=["x"])
    return Doors(model, path, depgraph.trace(model, batches[0]), depgraph.trace(path), batches)
