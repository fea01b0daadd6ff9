"""What a row of the table of rules is tried on: an operator, its arguments, and what its rule should leave free.

A dim is written ``argument.number`` (``weight.0``); the tensors of a list argument are ``tensors0``, ``tensors1``, the
results ``out`` or ``out0``, ``out1``. By default every dim of size 2 or more must be free, exact, and its indices told
apart; `fixed`, `mixed` and `tied` name the dims that aren't (``*`` for all).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Fill = Literal["normal", "positive", "share", "complex", "bool", "int", "twos", "twos32", "threes", "boxes"]

_SAME = {"twos": (2, torch.int64), "twos32": (2, torch.int32), "threes": (3, torch.int64)}


@dataclass(frozen=True)
class T:
    """A random tensor argument; integers lie below `high`."""

    shape: tuple[int, ...]
    fill: Fill = "normal"
    high: int = 2

    def make(self) -> torch.Tensor:
        if self.fill == "bool":
            return torch.arange(self.numel).reshape(self.shape) % 3 != 1
        if self.fill in _SAME:
            number, dtype = _SAME[self.fill]
            return torch.full(self.shape, number, dtype=dtype)
        if self.fill == "int":
            return (torch.arange(self.numel) * 5 + 1).reshape(self.shape) % self.high
        if self.fill == "boxes":
            return torch.tensor([[k % 2, k, 1, k + 4, 6] for k in range(self.shape[0])], dtype=torch.float64)
        if self.fill == "complex":
            return torch.randn(self.shape, dtype=torch.complex128)
        if self.fill == "share":
            return torch.rand(self.shape, dtype=torch.float64) * 0.8 + 0.1
        drawn = torch.randn(self.shape, dtype=torch.float64)
        return drawn.abs() + 1 if self.fill == "positive" else drawn

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def t(*shape: int) -> T:
    """A tensor of normal numbers."""
    return T(shape)


def pos(*shape: int) -> T:
    """A tensor of numbers above 1."""
    return T(shape, "positive")


def share(*shape: int) -> T:
    """A tensor of numbers from 0.1 to 0.9."""
    return T(shape, "share")


def cplx(*shape: int) -> T:
    """A complex tensor."""
    return T(shape, "complex")


def bools(*shape: int) -> T:
    """A mask, two thirds of which are true."""
    return T(shape, "bool")


def ints(high: int, *shape: int) -> T:
    """Integers from 0 to `high` - 1."""
    return T(shape, "int", high)


def boxes(count: int) -> T:
    """Boxes [count, 5] of two images of 8 by 8: the image, two corners."""
    return T((count, 5), "boxes")


def words(text: str) -> list[str]:
    """The words of a text: names of operators that share a sample."""
    return text.split()


@dataclass(frozen=True)
class Sample:
    """One call of one operator, and what its rule should say about it.

    `tied` gives, for dims whose indices can't all be told apart, how many can: ``out.1:4``. `cut` gives the arguments
    that change with kept sizes where the graph form (`depgraph.cutting.rewriting`) isn't what computes them; `gap` says
    what is still missing elsewhere for the sample to pass. `poison` is what removed indices hold (no NaN where the
    operator multiplies what it made of them with zeros).
    """

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    fixed: str = ""
    mixed: str = ""
    tied: str = ""
    gap: str = ""
    poison: float = float("nan")
    cut: Callable[[Callable[[str], tuple[int, ...]]], dict[str, Any]] | None = None

    @property
    def operator(self) -> Any:
        """The overload that is called: the one named, or ``default``."""
        namespace, name, *overload = self.target.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload[0] if overload else "default")

    def __str__(self) -> str:
        shapes = [
            ",".join(map(str, a.shape)) if isinstance(a, T) else str(a) for a in self.args if not isinstance(a, list)
        ]
        return f"{self.target.removeprefix('aten.')}({' '.join(shapes)})"


def sample(target: str, *args: Any, **more: Any) -> Sample:
    """A sample; keywords that aren't fields of `Sample` are the operator's own."""
    own = {name: more.pop(name) for name in ("fixed", "mixed", "tied", "gap", "poison", "cut") if name in more}
    return Sample(f"aten.{target}", args, more, **own)
