"""Dataclasses as plain data that JSON takes, and back."""

from __future__ import annotations

import math
import types
from dataclasses import asdict, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


def plain(thing: Any) -> dict[str, Any]:
    """A dataclass as plain data; numbers that aren't finite, which JSON has none of, become None."""
    return _finite(asdict(thing))


def rebuilt(kind: Any, data: Any) -> Any:
    """`data` as what the annotation `kind` says: dataclasses, tuples, dicts, options and what JSON knows.

    Raises ValueError, TypeError, KeyError or AttributeError where it is something else.
    """
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return None if data is None else rebuilt(next(k for k in inner if k is not type(None)), data)
    if get_origin(kind) is tuple:
        kinds = [inner[0]] * len(data) if inner[-1] is Ellipsis else inner
        return tuple(rebuilt(k, value) for k, value in zip(kinds, data, strict=True))
    if get_origin(kind) is dict:
        return {name: rebuilt(inner[1], value) for name, value in data.items()}
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if unknown := data.keys() - hints.keys():
            raise ValueError(f"it has a part {sorted(unknown)[0]!r} that this version doesn't know")
        return kind(**{name: rebuilt(hints[name], value) for name, value in data.items()})  # type: ignore[operator]
    if not isinstance(data, (float, int) if kind is float else kind):
        raise ValueError(f"{data!r} stands where {kind.__name__} belongs")
    return float(data) if kind is float else data


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data
