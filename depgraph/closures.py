"""Functions that a model holds, such as hooks and lambdas, and that speak of its modules or tensors: a copy's speak of the copy's.

`copy.deepcopy` copies bound methods, but takes a function for a constant, whatever its closure holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEPTH = 3  # functions within functions that are looked at

Copies = Mapping[int, Any]


def follow_copy(fresh: nn.Module, copies: Copies) -> None:
    """Replace the functions in `fresh`, a deep copy, that hold what was copied; `copies` is the copy's memo."""
    for holder in (holder for module in fresh.modules() for holder in _holders(module)):
        for key, held in list(holder.items()):
            if type(held) is FunctionType:
                holder[key] = _successor(held, copies, _DEPTH)


def _holders(module: nn.Module) -> Iterator[dict[Any, Any]]:
    own = vars(module)
    yield own
    yield from (own[name] for name in _HOOKS if own.get(name))


def _successor(one: Any, copies: Copies, depth: int) -> Any:
    """What stands for a thing that a function holds: itself, where it has no copy."""
    if isinstance(one, (nn.Module, torch.Tensor)):
        return copies.get(id(one), one)
    if type(one) is MethodType and id(one.__self__) in copies:
        return MethodType(one.__func__, copies[id(one.__self__)])
    return _followed(one, copies, depth) if type(one) is FunctionType and depth else one


def _followed(function: FunctionType, copies: Copies, depth: int) -> FunctionType:
    """The function with the copies of what its closure and its defaults hold; itself where these have none."""
    cells = [inside(cell) for cell in function.__closure__ or ()]
    named = function.__kwdefaults__ or {}
    held = [*cells, *(function.__defaults__ or ()), *named.values()]
    new = [_successor(one, copies, depth - 1) for one in held]
    if all(one is other for one, other in zip(held, new, strict=True)):
        return function
    closure = tuple(CellType() if one is CellType else CellType(one) for one in new[: len(cells)])
    defaults = tuple(new[len(cells) : len(new) - len(named)]) or None
    fresh = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    fresh.__kwdefaults__ = dict(zip(named, new[len(new) - len(named) :], strict=True)) or None
    for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(fresh, name, getattr(function, name))
    fresh.__dict__.update(function.__dict__)
    return fresh


def inside(cell: CellType) -> Any:
    """What a closure's cell holds; the type of cells where it is empty yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return CellType
