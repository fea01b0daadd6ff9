"""All that a model's modules hold, put back exactly: a forward may cache tensors, set attributes or replace modules."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_MAX_DEPTH, _MAX_ITEMS = 5, 1024
_CONTAINERS = (list, dict, set)
_FOREIGN = frozenset(sys.stdlib_module_names - {"types", "argparse"}) | {"torch", "numpy"}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever happens within: every list, dict, set and plain object that `model` holds has the same contents afterwards.

    Contents are the same by identity: what was added is gone, what was replaced or removed is back, in the old order.
    Tensors keep what was written into them.
    """
    saved = [(container, _copied(container)) for container in _containers(model)]
    try:
        yield
    finally:
        for container, before in saved:
            if not _is_same(container, before):
                _fill(container, before)


def is_open(value: Any) -> bool:
    """Whether `value` is an object with attributes to look into, such as a config."""
    if isinstance(value, (nn.Module, torch.Tensor, type, enum.Enum)) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.split(".")[0] not in _FOREIGN


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
        return all(a is b for a, b in zip(container, before, strict=True))
    pairs = zip(container.items(), before.items(), strict=True)
    return all(key is old or key == old for (key, _), (old, _) in pairs) and all(
        value is before[key] for key, value in container.items()
    )


def _fill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
        return
    container.clear()
    container.update(before)
