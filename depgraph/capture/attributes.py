"""The integers that a model's modules hold: putting `SizeInt`s in their place, and setting them afterwards.

Found are plain integers in the `vars` of every module, in tuples, lists and dicts there, in plain objects with a
`__dict__` (configs), nested to a bounded depth, and integers of a module's class. A list, dict or object that several
modules share is one attribute, under the first path found; tuples can't be shared, since they can't be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from depgraph.capture.restating import restate
from depgraph.capture.restoring import is_open
from depgraph.capture.sizes import Attr, SizeFloat, SizeInt, plain
from depgraph.errors import CutError

_MAX_DEPTH = 4
_MAX_ITEMS = 1024
_TORCH_OWN = frozenset(vars(nn.Module())) | {"_version"}

Change = Callable[[Any, Attr], Any]
Undo = Callable[[], None]


def current(model: nn.Module, attr: Attr) -> int:
    """The integer that `attr` names in `model`.

    Raises:
        CutError: the model has no such attribute.
    """
    try:
        return _read(model.get_submodule(attr.module), attr)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CutError(f"{attr} is not in the model; was it changed since the graph was captured?") from error


def _read(module: nn.Module, attr: Attr) -> int:
    value = getattr(module, attr.name)
    for key in attr.keys:
        value = _items(value)[key]
    return plain(value)


def assign(model: nn.Module, attr: Attr, value: int) -> Undo:
    """Set the integer that `attr` names in `model` to `value`; the returned function takes it back.

    Lists, dicts and objects are changed in place, so that all who share them see it; tuples are rebuilt. An integer of
    the class becomes one of the instance. What a copy of the module would make the integer from follows.

    Raises:
        CutError: the model has no such attribute.
    """
    before = current(model, attr)
    module = model.get_submodule(attr.module)
    holder = vars(module)
    undo: list[Undo] = []
    _put(holder, attr.name, _changed(getattr(module, attr.name), attr.keys, value, undo), undo)
    undo += restate(module, lambda held: _read(held, attr), before)

    def take_back() -> None:
        for step in reversed(undo):
            step()

    return take_back


def mark(model: nn.Module) -> None:
    """Put a `SizeInt` in the place of every integer of `model`; only within `restored`."""
    defaults = [
        (vars(module), name, SizeInt(value, Attr(path, name)))
        for path, module in model.named_modules()
        for name, value in _class_integers(module).items()
    ]
    _change_all(_places(model), lambda value, attr: SizeInt(value, attr))
    for holder, name, value in defaults:
        holder[name] = value


def held_in(model: nn.Module) -> Iterator[tuple[Any, int | str, Any]]:
    """What modules, and the lists, dicts and objects in them, hold, each with its container and its key there."""
    for place in list(_places(model)):
        for key in place.keys:
            yield place.container, key, _get(place.container, key)


_ABSENT = object()
_NUMBERS = (int, SizeInt, SizeFloat)


class _Place(NamedTuple):
    """A list or dict (`vars` of a module or object) that may hold integers, the keys to look at, and the way to it."""

    container: Any
    keys: list[int | str]
    module: str
    way: tuple[int | str, ...]

    def attr(self, key: int | str) -> Attr:
        name, *keys = (*self.way, key)
        return Attr(self.module, str(name), tuple(keys))


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every place below `model`, each once, under the first way found."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        holder = vars(module)
        names: list[int | str] = [name for name in holder if name not in _TORCH_OWN and not name.startswith("__")]
        yield from _below(_Place(holder, names, path, ()), seen)


def _below(place: _Place, seen: set[int]) -> Iterator[_Place]:
    yield place
    for key in place.keys if len(place.way) <= _MAX_DEPTH else ():
        value = _get(place.container, key)
        if not (isinstance(value, (list, dict)) or is_open(value)) or id(value) in seen:
            continue
        seen.add(id(value))
        items = _items(value)
        if len(items) <= _MAX_ITEMS:
            keys = list(items) if isinstance(items, dict) else range(len(items))
            inner: list[int | str] = [key for key in keys if isinstance(key, (int, str))]
            yield from _below(_Place(items, inner, place.module, (*place.way, key)), seen)


def _change_all(places: Iterable[_Place], change: Change) -> None:
    for place in places:
        for key in place.keys:
            value = _get(place.container, key)
            if type(value) not in _NUMBERS and not isinstance(value, tuple):
                continue
            changed = _changed_number(value, place.attr(key), change)
            if changed is not value:
                _set(place.container, key, changed)


def _changed_number(value: Any, attr: Attr, change: Change) -> Any:
    """`value` with every number changed, if it is a number or a tuple of such; itself where nothing changes."""
    if type(value) in _NUMBERS:
        return change(value, attr)
    if not isinstance(value, tuple) or len(value) > _MAX_ITEMS or len(attr.keys) > _MAX_DEPTH:
        return value
    items = [
        _changed_number(item, Attr(attr.module, attr.name, (*attr.keys, position)), change)
        for position, item in enumerate(value)
    ]
    return value if all(new is old for new, old in zip(items, value, strict=True)) else _same_kind(value, items)


def _same_kind(value: tuple, items: list) -> tuple:
    kind = type(value)
    if hasattr(kind, "_make"):
        return kind._make(items)
    return kind(items) if kind in (tuple, torch.Size) else value


def _class_integers(module: nn.Module) -> dict[str, int]:
    """Integers of the module's classes that its instance doesn't hide, most derived class first."""
    found: dict[str, int] = {}
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for name, value in vars(kind).items():
            if name not in _TORCH_OWN and not name.startswith("__"):
                found.setdefault(name, value)
    own = vars(module)
    return {name: value for name, value in found.items() if type(value) is int and name not in own}


def _items(value: Any) -> Any:
    return value if isinstance(value, (list, tuple, dict)) else vars(value)


def _get(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return dict.get(container, key, _ABSENT)
    return list.__getitem__(container, key) if key < len(container) else _ABSENT


def _set(container: Any, key: Any, value: Any) -> None:
    (dict if isinstance(container, dict) else list).__setitem__(container, key, value)


def _delete(container: Any, key: Any) -> None:
    dict.__delitem__(container, key)


def _put(container: Any, key: Any, value: Any, undo: list[Undo]) -> None:
    before = _get(container, key)
    if before is value:
        return
    undo.append(lambda: _delete(container, key) if before is _ABSENT else _set(container, key, before))
    _set(container, key, value)


def _changed(value: Any, keys: tuple[int | str, ...], new: int, undo: list[Undo]) -> Any:
    if not keys:
        return new
    items = _items(value)
    inner = _changed(items[keys[0]], keys[1:], new, undo)
    if isinstance(value, tuple):
        return _same_kind(value, [inner if position == keys[0] else item for position, item in enumerate(value)])
    _put(items, keys[0], inner, undo)
    return value
