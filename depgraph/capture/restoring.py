"""All that a model's modules hold, put back exactly: a forward may cache tensors, set attributes or replace modules.

What is written into the memory of tensors is put back by `keeping`, which sees the operators that do so.
"""

from __future__ import annotations

import enum
import operator
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from depgraph.capture.proxies import storage_key

_MAX_DEPTH, _MAX_ITEMS = 5, 1024
_CONTAINERS = (list, dict, set)
_NESTED = (*_CONTAINERS, tuple)
_FOREIGN = frozenset(sys.stdlib_module_names - {"types", "argparse"}) | {"torch", "numpy"}


@contextmanager
def restored(model: nn.Module, *inputs: Any) -> Iterator[list[Tensor]]:
    """Whatever happens within: all that `model` and its `inputs` hold is the same afterwards. Gives the tensors among it.

    Every list, dict, set and plain object has the same contents by identity: what was added is gone, what was replaced or
    removed is back, in the old order. Every tensor has the same memory and layout; what is written there stays.
    """
    found, empty, held = _held_by(model, inputs)
    saved = [(container, _copied(container)) for container in found]
    tensors = [(tensor, tensor.detach()) for tensor in held]
    try:
        yield held
    finally:
        for container in empty:
            if container:
                container.clear()
        for container, before in saved:
            if not _is_same(container, before):
                _fill(container, before)
        for tensor, alias in tensors:
            if _layout(tensor) != _layout(alias):
                tensor.data = alias


def tensors_held(model: nn.Module) -> list[Tensor]:
    """Every tensor that modules hold, and lists, dicts and objects in them, once each."""
    return _held_by(model, ())[2]


def own_containers(inputs: Any) -> Any:
    """The same inputs in new lists and dicts: a forward may add to those."""
    return pytree.tree_map(lambda leaf: leaf, inputs)


def is_open(value: Any) -> bool:
    """Whether `value` is an object with attributes to look into, such as a config."""
    kind: Any = type(value)
    return _holds(kind) is _Holds.ATTRIBUTES and hasattr(value, "__dict__")


class _Holds(enum.Enum):
    """What an object of a class may hold that a forward could change: asked of every attribute of every module."""

    NOTHING = enum.auto()
    NUMBERS = enum.auto()
    ITEMS = enum.auto()
    ATTRIBUTES = enum.auto()


@cache
def _holds(cls: Any) -> _Holds:
    if issubclass(cls, Tensor):
        return _Holds.NUMBERS
    if issubclass(cls, _NESTED) and cls is not torch.Size:
        return _Holds.ITEMS
    if issubclass(cls, (nn.Module, type, enum.Enum, int, float)) or cls.__module__.split(".")[0] in _FOREIGN:
        return _Holds.NOTHING
    return _Holds.ATTRIBUTES


def _held_by(model: nn.Module, inputs: Any) -> tuple[list[Any], list[Any], list[Tensor]]:
    """Every list, dict and set that modules and inputs hold, filled ones and empty ones, and every tensor that has memory of its
    own kind, once each."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    left: list[tuple[Any, int]] = [(vars(module), _MAX_DEPTH) for module in reversed(modules)]
    left.append((inputs, _MAX_DEPTH))
    seen = {id(getattr(model, "depgraph_record", None))}  # large, and no forward knows of it
    found: list[Any] = []
    empty: dict[int, Any] = {}
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    nothing, numbers, items = _Holds.NOTHING, _Holds.NUMBERS, _Holds.ITEMS
    while left:
        container, depth = left.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        if not isinstance(container, tuple):
            found.append(container)
        closed = not depth or _count(container) > _MAX_ITEMS or isinstance(container, set)
        below = depth if isinstance(container, tuple) else depth - 1
        for value in container.values() if isinstance(container, dict) else container:
            kind: Any = type(value)
            held = _holds(kind)
            if held is nothing:
                continue
            if held is numbers:
                tensors[id(value)] = value
            elif closed:
                continue
            elif held is items and _count(value):
                left.append((value, below))
            elif held is items and not isinstance(value, tuple):  # most are: a module has a dozen dicts for hooks
                empty[id(value)] = value
            elif held is not items and hasattr(value, "__dict__"):
                left.append((vars(value), below))
    return found, [*empty.values()], [tensor for tensor in tensors.values() if _has_memory(tensor)]


def _count(container: Any) -> int:
    """How many items it has, by itself: a class of the model's may count something else, or nothing."""
    return (
        len(container)
        if type(container) in _NESTED
        else next(k for k in _NESTED if isinstance(container, k)).__len__(container)
    )


def _has_memory(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return storage_key(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _copied(container: Any) -> Any:
    kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    return kind(container)


def _is_same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, set):
        return bool(container == before)
    if isinstance(container, list):
        return all(map(operator.is_, container, before))
    return list(container) == list(before) and all(map(operator.is_, container.values(), before.values()))


def _fill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
        return
    kind = next(kind for kind in (OrderedDict, dict, set) if isinstance(container, kind))  # subclasses may refuse
    kind.clear(container)
    kind.update(container, before)
