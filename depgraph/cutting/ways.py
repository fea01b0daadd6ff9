"""Ways through lists, dicts and objects, as configs have them: to look at what lies at the end, and to change it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Undo = Callable[[], None]


def look(value: Any, keys: Iterable[Any]) -> Any:
    """What lies at the end of a way through lists, dicts and objects."""
    for key in keys:
        value = value[key] if isinstance(value, (list, tuple, dict)) else getattr(value, key)
    return value


def put(value: Any, keys: tuple[Any, ...], new: Any) -> Undo:
    """Set what lies at the end of a way; tuples are rebuilt. The returned function takes it back."""
    holder = look(value, keys[:-1])
    before = look(holder, keys[-1:])
    if isinstance(holder, tuple):
        return put(value, keys[:-1], tuple(new if k == keys[-1] else item for k, item in enumerate(holder)))
    _set(holder, keys[-1], new)
    return lambda: _set(holder, keys[-1], before)


def _set(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, (list, dict)):
        holder[key] = value
    else:
        setattr(holder, key, value)
