"""What every entry of the zoo is: a small seeded model with the inputs that a user would give it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .randomise import randomise


@dataclass
class Example:
    """A module in eval mode with randomised values, and one call's arguments."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """The model's output on the example's inputs, without gradients."""
        with torch.no_grad():
            return self.model(*self.args, **self.kwargs)


Builder = Callable[[], Example]


def seeded(name: str, make: Builder) -> Builder:
    """A builder whose result depends on ``name`` alone and that leaves the global random state as it was."""
    seed = zlib.crc32(name.encode())

    def build() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            example = make()
        example.model.eval()
        randomise(example.model, seed)
        return example

    return build
