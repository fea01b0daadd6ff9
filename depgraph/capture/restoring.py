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
    saved = [(container, _copied(container)) for container in _containers(model)]
    held = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
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


def _containers(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield from _within(vars(module), _MAX_DEPTH, seen)


def _within(container: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if id(container) in seen:
        return
    seen.add(id(container))
    yield container
    if not depth or len(container) > _MAX_ITEMS or isinstance(container, set):
        return
    for value in list(container.values() if isinstance(container, dict) else container):
        if type(value) in _PLAIN:
            continue
        if isinstance(value, _CONTAINERS):
            yield from _within(value, depth - 1, seen)
        elif isinstance(value, tuple):
            yield from (c for one in value if isinstance(one, _CONTAINERS) for c in _within(one, depth - 1, seen))
        elif is_open(value):
            yield from _within(vars(value), depth - 1, seen)


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
