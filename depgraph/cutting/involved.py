"""Stopping a symbolic capture whose sizes grow so involved that reasoning about them takes longer than the model is worth."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from depgraph.capture.hooking import while_running

_MOST = 48  # operations in the formula of one size; torch takes seconds for each comparison of such


class Involved(Exception):
    """A size is made of more operations than can be reasoned about in bounded time."""


def none_involved(model: nn.Module) -> AbstractContextManager[None]:
    """Within, `model` raises Involved where it makes a tensor of such a size.

    Windows, padding and strides in turn nest divisions of divisions: a hierarchical transformer whose height and width are open
    has sizes of a hundred operations after three stages.
    """
    return while_running(model, _Looking)


class _Looking(TorchFunctionMode):
    """Looks at the sizes of every tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        made = func(*args, **(kwargs or {}))
        for size in made.shape if isinstance(made, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                self._look(getattr(func, "__name__", str(func)), size.node.expr)
        return made

    def _look(self, name: str, formula: Any) -> None:
        if formula in self.plain:
            return
        if formula.count_ops() > _MOST:
            raise Involved(f"{name} gives a tensor of size {formula}")
        self.plain.add(formula)
