"""Tensors inside objects that torch doesn't look into: a dataclass, a namespace, a batch of some library, a dict's subclass.

torch's pytrees find tensors in what is registered with them. A class of which an input or an output is an instance, with a
tensor somewhere inside, is registered here, so that capturing, comparing and exporting all see the same tensors.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.errors import OpaqueValue

_PLAIN = (str, bytes, int, float, complex, type(None), np.ndarray, np.generic, enum.Enum, torch.Size, torch.dtype)
_NOT_DATA = (type, FunctionType, MethodType, ModuleType, nn.Module)
_DEEPEST = 8
_registered: set[type] = set()


class _Part(NamedTuple):
    """Something that an object holds: an attribute, or an item under a key."""

    key: Any
    value: Any
    is_item: bool


@dataclass(eq=False)
class _Others:
    """How to make an object again but for its tensors: its class, where these go, and all else that it holds."""

    cls: type
    places: tuple[tuple[Any, bool], ...]
    rest: tuple[_Part, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Others) and (self.cls, self.places) == (other.cls, other.places)


def see_inside(values: Any, what: str) -> None:
    """Let pytrees see the tensors in every object among `values`, which `what` names in a message (an output, an input).

    Raises OpaqueValue for an object that can't be taken apart and put together again.
    """
    _see(values, what, ())


def _see(value: Any, what: str, above: tuple[Any, ...]) -> bool:
    """Does `value` hold a tensor? Classes of objects that do are registered, the inner ones first."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, (*_PLAIN, *_NOT_DATA)) or len(above) > _DEEPEST:
        return False
    kind = type(value).__name__
    if isinstance(value, Iterator):
        raise OpaqueValue(f"{what} is a {kind}, which can be read only once: give a list or a tuple of what is in it")
    if any(value is one for one in above):
        return False
    if isinstance(value, (set, frozenset)):
        if any(isinstance(one, Tensor) for one in value):
            raise OpaqueValue(f"{what} holds tensors in a set, which has no order: give a list or a tuple of them")
        return False
    known = _inside(value)
    inside = [part.value for part in _parts(value)] if known is None else known
    held = [_see(one, what, (*above, value)) for one in inside]
    if any(held) and any(one is outer for one in inside for outer in (*above, value)):
        raise OpaqueValue(
            f"{what} holds a {kind} that is part of itself, so that it can't be taken apart: give its tensors"
        )
    if any(held) and known is None:
        _register(type(value))
    return any(held)


def _inside(value: Any) -> list[Any] | None:
    """What torch itself finds in `value`, one level deep; None where it doesn't look into it."""
    kind = type(value)
    if pytree.is_namedtuple_instance(value):
        return list(value)
    if kind in _registered or kind not in pytree.SUPPORTED_NODES:
        return None
    children, _ = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
    return list(children)


def _parts(value: Any) -> Iterator[_Part]:
    """All that an object holds."""
    if isinstance(value, dict):
        yield from (_Part(key, one, True) for key, one in value.items())
    elif isinstance(value, (list, tuple)):
        yield from (_Part(position, one, True) for position, one in enumerate(value))
    for name in [n for cls in type(value).__mro__ for n in _slots(cls)]:
        if hasattr(value, name):
            yield _Part(name, getattr(value, name), False)
    yield from (_Part(name, one, False) for name, one in getattr(value, "__dict__", {}).items())


def _slots(cls: type) -> list[str]:
    named = cls.__dict__.get("__slots__", ())
    return [n for n in ([named] if isinstance(named, str) else named) if n not in ("__dict__", "__weakref__")]


def _register(cls: type) -> None:
    if cls not in pytree.SUPPORTED_NODES:
        _registered.add(cls)
        name = f"{cls.__module__}.{cls.__qualname__}"
        pytree.register_pytree_node(
            cls, _taken_apart, _put_together, serialized_type_name=name, flatten_with_keys_fn=_taken_apart_by_key
        )


def _taken_apart(value: Any) -> tuple[list[Any], _Others]:
    parts = list(_parts(value))
    held = [part for part in parts if _has_tensor(part.value)]
    rest = tuple(part for part in parts if not any(part is one for one in held))
    return [part.value for part in held], _Others(type(value), tuple((p.key, p.is_item) for p in held), rest)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _taken_apart_by_key(value: Any) -> tuple[list[tuple[Any, Any]], _Others]:
    values, others = _taken_apart(value)
    keys: list[Any] = [pytree.MappingKey(key) if is_item else pytree.GetAttrKey(key) for key, is_item in others.places]
    return list(zip(keys, values, strict=True)), others


def _put_together(values: Any, others: _Others) -> Any:
    given = [_Part(key, value, is_item) for (key, is_item), value in zip(others.places, values, strict=True)]
    parts = [*given, *others.rest]
    items = {part.key: part.value for part in parts if part.is_item}
    made: Any = _new(others.cls, items)
    for part in parts:
        if not part.is_item:
            object.__setattr__(made, part.key, part.value)
    return made


def _new(cls: type, items: dict[Any, Any]) -> Any:
    if issubclass(cls, tuple):
        return tuple.__new__(cls, (items[position] for position in sorted(items)))
    made: Any = cls.__new__(cls)
    if isinstance(made, dict):
        dict.update(made, items)
    elif isinstance(made, list):
        list.extend(made, (items[position] for position in sorted(items)))
    return made
