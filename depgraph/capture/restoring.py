"""All that a model's modules hold, put back exactly: a forward may cache tensors, set attributes or replace modules."""

from __future__ import annotations

import enum
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from depgraph.capture.proxies import storage_key

_MAX_DEPTH, _MAX_ITEMS = 5, 1024
_CONTAINERS = (list, dict, set)
_PLAIN = frozenset(
    [int, float, bool, str, type(None), torch.Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device]
)
_FOREIGN = frozenset(sys.stdlib_module_names - {"types", "argparse"}) | {"torch", "numpy"}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever happens within: every list, dict, set and plain object that `model` holds has the same contents afterwards.

    Contents are the same by identity: what was added is gone, what was replaced or removed is back, in the old order.
    Parameters and buffers have their memory again (`p.data = ...`); what was written into it stays.
    """
    found = _containers(model)
    empty = [container for container in found if not container]
    saved = [(container, _copied(container)) for container in found if container]
    held = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for container in empty:
            if container:
                container.clear()
        for container, before in saved:
            if not _is_same(container, before):
                _fill(container, before)
        for tensor, data in held:
            if storage_key(tensor) != storage_key(data):
                tensor.data = data


def is_open(value: Any) -> bool:
    """Whether `value` is an object with attributes to look into, such as a config."""
    kind: Any = type(value)
    return _may_be_open(kind) and hasattr(value, "__dict__")


@cache
def _may_be_open(cls: Any) -> bool:
    if issubclass(cls, (nn.Module, torch.Tensor, type, enum.Enum)):
        return False
    return cls.__module__.split(".")[0] not in _FOREIGN


def _containers(model: nn.Module) -> list[Any]:
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    left = [(vars(module), _MAX_DEPTH) for module in reversed(modules)]
    seen: set[int] = set()
    found: list[Any] = []
    while left:
        container, depth = left.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        found.append(container)
        if container and depth and len(container) <= _MAX_ITEMS and not isinstance(container, set):
            values = container.values() if isinstance(container, dict) else container
            left += [(one, depth - 1) for value in values if type(value) not in _PLAIN for one in _held_by(value)]
    return found


def _held_by(value: Any) -> list[Any]:
    """The containers that `value` is, or that it holds itself."""
    if isinstance(value, _CONTAINERS):
        return [value]
    if isinstance(value, tuple):
        return [one for one in value if isinstance(one, _CONTAINERS)]
    return [vars(value)] if is_open(value) else []


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
    container.clear()
    container.update(before)
