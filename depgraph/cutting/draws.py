"""The random numbers that a pruned model draws, given to the reference too: the model draws fewer than the original does.

The same seed would give other numbers in the places that stay, and the outputs of a sampling model (a variational
autoencoder, noise in a forward) couldn't be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.cutting.slicing import positions
from depgraph.graph import Value
from depgraph.operators import by_name
from depgraph.widths import Kept

_aten = torch.ops.aten


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """The random numbers drawn within are the same each time; the random state is put back, that of GPUs in use too."""
    in_use = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    # torch.manual_seed formats a stack for every kind of device, which takes a millisecond
    seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    with torch.random.fork_rng(in_use):
        seed(0)
        yield


@cache
def draws(target: Any) -> bool:
    """Does an operator draw random numbers?"""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


@cache
def _from_nothing(target: Any) -> bool:
    """Does what an operator draws depend on no tensor's values? What is drawn by values that are wrong must be seen."""
    schema = target._schema
    given = sum("Tensor" in str(argument.type) for argument in schema.arguments)
    as_large = schema.is_mutable or schema.name.endswith("_like") or schema.overload_name == "p"
    return given == 0 or (given == 1 and as_large)


def may_draw(node: Node) -> bool:
    """Does an operator of a graph draw random numbers? Dropout out of training and with no share to drop doesn't."""
    if not draws(node.target):
        return False
    given = by_name(node)
    return bool(given.get("train", True) and given.get("dropout_p", 1.0) != 0.0)


def by_own_generator(nodes: Iterable[Node]) -> Node | None:
    """The first operator that draws by a generator of the model's code, whose state a graph would go on from, run after run."""
    return next((n for n in nodes if draws(n.target) and by_name(n).get("generator") is not None), None)


@dataclass
class Draws:
    """What a forward drew, in order, and how much of it another forward has taken over (None: it draws otherwise)."""

    made: list[tuple[Any, Any]] = field(default_factory=list)
    taken: int | None = 0

    @property
    def followed(self) -> bool:
        """Has the other one drawn all of it?"""
        return bool(self.made) and self.taken == len(self.made)


class _Noting(TorchDispatchMode):
    """Hands on what every operator draws while it is on; of dropout in one operator the mask, as of dropout in several."""

    def noted(self, func: Any, drawn: Any) -> None:
        """What an operator drew, which may still be changed."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        if func is _aten.native_dropout.default:
            return self._dropout(*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if draws(func):
            self.noted(func, made)
        return made

    def _dropout(self, x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        stays = torch.empty_like(x).bernoulli_(1 - p)
        self.noted(_aten.bernoulli_.float, stays)
        return x * stays * (0.0 if p == 1 else 1 / (1 - p)), stays.bool()


class Drawing(_Noting):
    """Notes what every operator draws while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = Draws()

    def noted(self, func: Any, drawn: Any) -> None:
        """Keep it."""
        self.draws.made.append((func, drawn.clone() if isinstance(drawn, torch.Tensor) else None))


class Redrawing(_Noting):
    """Lets operators draw what `draws` holds from `position` on, where a dim of `value` keeps an index.

    `value` is what the operator makes, narrowed to `here` now and to `kept` where it was drawn.
    """

    def __init__(self, draws: Draws, value: Value, here: Kept, kept: Kept) -> None:
        super().__init__()
        self.draws = draws
        self.position = draws.taken
        self.at = [_places(value, d, here, kept) for d in range(len(value.shape))]
        self.shape = here.shape(value)

    def noted(self, func: Any, drawn: Any) -> None:
        """Put what is known in its place."""
        if self.position is not None:
            self.position = self.position + 1 if self._take(func, drawn) else None

    def _take(self, func: Any, made: Any) -> bool:
        """Put what was drawn in its place; False where something else was drawn.

        What isn't drawn for each number of what the operator makes, as in attention, is the same if it has the same shape.
        """
        known, theirs = next(iter(self.draws.made[self.position :]), (None, None))
        if known is not func or theirs is None or not _from_nothing(func):
            return False
        if tuple(map(len, self.at)) == tuple(theirs.shape) and tuple(made.shape) == self.shape:
            made[torch.meshgrid(*self.at, indexing="ij") if self.at else ()] = theirs.to(made)
            return True
        if made.shape == theirs.shape:
            made.copy_(theirs)
        return bool(made.shape == theirs.shape)


def _places(value: Value, d: int, here: Kept, kept: Kept) -> torch.Tensor:
    stays = kept.of(value, d)
    return torch.arange(value.shape[d]) if stays is None else torch.from_numpy(positions(here.of(value, d), stays))
