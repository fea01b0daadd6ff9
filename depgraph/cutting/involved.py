"""Stopping a symbolic capture whose sizes grow so involved that reasoning about them takes longer than the model is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

_MOST = 48  # operations in the formula of one size; torch takes seconds for each comparison of such


class Involved(Exception):
    """A size is made of more operations than can be reasoned about in bounded time."""


@contextmanager
def none_involved() -> Iterator[None]:
    """Within, a module that gives a tensor of such a size raises Involved.

    Windows, padding and strides in turn nest divisions of divisions: a hierarchical transformer whose height and width are open
    has sizes of a hundred operations after three stages.
    """
    plain: set[Any] = set()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            for size in leaf.shape if isinstance(leaf, torch.Tensor) else ():
                formula = size.node.expr if isinstance(size, torch.SymInt) else 0
                if formula in plain:
                    continue
                if isinstance(size, torch.SymInt) and formula.count_ops() > _MOST:
                    raise Involved(f"{type(module).__name__} gives a tensor of size {formula}")
                plain.add(formula)

    handle = register_module_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
