"""Random forwards out of small steps, over sequences [2, 4, width] and pictures [2, channels, 6, 6].

Layers and decisions by sizes are made in the first run and kept, so that a cut program goes the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[["Program", Tensor, "Draw"], Tensor]
SEQUENCES: dict[str, Step] = {}
PICTURES: dict[str, Step] = {}
VALUES: dict[str, Step] = {}
WIDE = 28


class Draw:
    """What a step is to be like: numbers drawn once for it, and its place, after which its layers are called."""

    def __init__(self, source: random.Random, place: int) -> None:
        self.drawn, self.place = [source.random() for _ in range(3)], place

    def among(self, *choices: Any, by: int = 0) -> Any:
        return choices[int(self.drawn[by] * len(choices))]


class Program(nn.Module):
    """Some steps of a table, drawn by a seed, between a first and a last layer."""

    def __init__(self, steps: dict[str, Step], seed: int) -> None:
        super().__init__()
        source = random.Random(seed)
        names = [source.choice(sorted(steps)) for _ in range(source.randint(3, 7))]
        self.steps = [(name, steps[name], Draw(source, k)) for k, name in enumerate(names)]
        self.width, self.pictures = source.choice([8, 12, 16]), steps is PICTURES
        self.layers, self.tensors, self.decided = nn.ModuleDict(), nn.ParameterDict(), dict[str, bool]()

    def __str__(self) -> str:
        return " ".join(name for name, *_ in self.steps)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(
            "first", lambda: nn.Conv2d(3, self.width, 3, padding=1) if self.pictures else nn.Linear(5, self.width)
        )(x)
        for _, step, draw in self.steps:
            h = step(self, h, draw)
        h = h.mean((2, 3)) if self.pictures else h
        made: Tensor = self.layer("last", lambda: nn.Linear(h.shape[-1], 3))(h)
        return made

    def layer(self, key: Any, make: Callable[[], nn.Module]) -> nn.Module:
        if str(key) not in self.layers:
            self.layers[str(key)] = _drawn(make()).eval()
        return self.layers[str(key)]

    def tensor(self, key: Any, *sizes: int) -> Tensor:
        if str(key) not in self.tensors:
            self.tensors[str(key)] = nn.Parameter(torch.randn(sizes) / 2)
        return self.tensors[str(key)]

    def holds(self, draw: Draw, condition: bool) -> bool:
        """A decision by sizes, as it was in the first run."""
        return self.decided.setdefault(str(draw.place), condition)


def _drawn(layer: nn.Module) -> nn.Module:
    """Norms and biases that do something."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.ndim == 1:
            tensor.data.uniform_(0.5, 2) if "weight" in name or "var" in name else tensor.data.normal_()
    return layer


def program(steps: dict[str, Step], seed: int) -> tuple[Program, Tensor]:
    """The program of a seed, whose layers are made, and an input."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made, x = Program(steps, seed).eval(), torch.randn(2, 3, 6, 6) if steps is PICTURES else torch.randn(2, 4, 5)
        made(x)
    return made, x


def sequence(step: Step) -> Step:
    SEQUENCES[step.__name__.strip("_")] = step
    return step


def picture(step: Step) -> Step:
    PICTURES[step.__name__.strip("_")] = step
    return step


def value(step: Step) -> Step:
    VALUES[step.__name__.strip("_")] = step
    return step


def even(width: int, parts: int, most: int = 1000) -> bool:
    """Does a width come apart into equal parts of two at least?"""
    return width % parts == 0 and 2 * parts <= width <= most
