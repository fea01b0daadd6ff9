"""Control flow of torch (`torch.cond`, `while_loop`, `scan`, `map`) by operators, so that a graph has the axes of what is within.

Of a condition both branches run, and each number of the one or the other is taken; loops take their steps one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops import cond, map, scan, while_loop  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from depgraph.closures import inside

Trees = Callable[..., Any]


@contextmanager
def by_operators(model: nn.Module) -> Iterator[None]:
    """Within, the control flow of torch is computed so wherever torch, or the code of a class of `model`'s, has a name for it."""
    places = [*_places(model)]
    for put, real in places:
        put(_OURS[real])
    try:
        yield
    finally:
        for put, real in places:
            put(real)


def _places(model: nn.Module) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """What sets each of the names, and what it holds: those of modules, and those that methods have from around their class."""
    classes = {type(module) for module in model.modules()}
    names = {"torch", "torch._higher_order_ops", *(c.__module__ for c in (*_OURS, *classes))}
    for held in [vars(sys.modules[name]) for name in names if name in sys.modules]:
        yield from ((partial(held.__setitem__, name), one) for name, one in [*held.items()] if _is_one(one))
    functions = [one for kind in classes for one in vars(kind).values() if isinstance(one, FunctionType)]
    for cell in {id(cell): cell for one in functions for cell in one.__closure__ or ()}.values():
        if _is_one(one := inside(cell)):
            yield partial(setattr, cell, "cell_contents"), one


def _is_one(thing: Any) -> bool:
    return isinstance(thing, FunctionType) and thing in _OURS


def _cond(pred: Any, true_fn: Trees, false_fn: Trees, operands: Any = ()) -> Any:
    if not isinstance(pred, Tensor):
        return (true_fn if pred else false_fn)(*operands)
    chosen, other = true_fn(*operands), false_fn(*operands)
    holds = pred.reshape(())
    return pytree.tree_map(lambda a, b: torch.where(holds, a, b) if isinstance(a, Tensor) else a, chosen, other)


def _while_loop(cond_fn: Trees, body_fn: Trees, carried_inputs: Any) -> Any:
    carried = carried_inputs
    while bool(cond_fn(*carried)):
        carried = body_fn(*carried)
    return carried


def _scan(combine_fn: Trees, init: Any, xs: Any, *, dim: int = 0, reverse: bool = False) -> Any:
    if not pytree.tree_leaves(xs):
        return init, []
    steps = _unbound(xs, dim)
    made, carry = [], init
    for step in reversed(steps) if reverse else steps:
        carry, out = combine_fn(carry, step)
        made.append(out)
    return carry, _stacked(made[::-1] if reverse else made, dim)


def _map(f: Trees, xs: Any, *args: Any) -> Any:
    return _stacked([f(one, *args) for one in _unbound(xs, 0)], 0)


def _unbound(xs: Any, dim: int) -> list[Any]:
    """The slices of all tensors along a dim."""
    leaves, form = pytree.tree_flatten(xs)
    return [
        pytree.tree_unflatten(list(parts), form) for parts in zip(*(leaf.unbind(dim) for leaf in leaves), strict=True)
    ]


def _stacked(made: list[Any], dim: int) -> Any:
    """What each step made, one beside the other: along a dim, or the first where what is made has fewer."""

    def stack(*parts: Any) -> Any:
        return torch.stack(parts, dim if dim <= parts[0].ndim else 0) if isinstance(parts[0], Tensor) else parts[0]

    return pytree.tree_map(stack, made[0], *made[1:])


_OURS: dict[Any, Trees] = {cond: _cond, while_loop: _while_loop, scan: _scan, map: _map}
