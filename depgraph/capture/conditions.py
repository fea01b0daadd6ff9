"""`torch.cond` by operators: both branches run, and each number of the one or the other is taken, so that a graph has the axes of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@contextmanager
def both_branches() -> Iterator[None]:
    """Within, `torch.cond` computes both of its branches and chooses between what they give."""
    real = torch.cond
    torch.cond = _both
    try:
        yield
    finally:
        torch.cond = real


def _both(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    if not isinstance(pred, Tensor):
        return (true_fn if pred else false_fn)(*operands)
    chosen, other = true_fn(*operands), false_fn(*operands)
    holds = pred.reshape(())
    return pytree.tree_map(lambda a, b: torch.where(holds, a, b) if isinstance(a, Tensor) else a, chosen, other)
