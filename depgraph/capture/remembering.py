"""Functions that keep what they gave (`functools.lru_cache`) compute anew what they are asked for sizes.

Such a cache takes sizes for equal that are equal as numbers, and gives what it made of others: numbers that don't remember
where they came from, or that remember another layer's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from depgraph.capture.sizes import SizeFloat, SizeInt

_Keeping = functools._lru_cache_wrapper
_LEFT_ALONE = frozenset([*sys.stdlib_module_names, "torch", "numpy", "sympy", __name__.partition(".")[0]])


@contextmanager
def asked_anew() -> Iterator[None]:
    """Within, no such function of a module of Python, or of a class that stands in one, answers from memory for sizes."""
    changed = []
    try:
        for owner, name, held in list(_found()):
            with suppress(AttributeError, TypeError):  # a class may not let itself be changed
                setattr(owner, name, _anew(held))
                changed.append((owner, name, held))
        yield
    finally:
        for owner, name, held in changed:
            setattr(owner, name, held)


class _Scan(NamedTuple):
    """Where such functions stood in a module when it was looked through: what holds them, and under which name."""

    module: Any
    size: int
    places: tuple[tuple[Any, str], ...]


_scans: dict[str, _Scan] = {}


def _found() -> Iterator[tuple[Any, str, Any]]:
    """Where functions that keep what they gave stand: a module or a class, the name there, and the function.

    A module is looked through again when it is another one, or has more or fewer names.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _LEFT_ALONE or not hasattr(module, "__dict__"):
            continue
        scan = _scans.get(name)
        if scan is None or scan.module is not module or scan.size != len(vars(module)):
            scan = _scans[name] = _Scan(module, len(vars(module)), tuple(_places(name, module)))
        for owner, attribute in scan.places:
            held = vars(owner).get(attribute)
            if isinstance(held, _Keeping):
                yield owner, attribute, held


def _places(name: str, module: Any) -> Iterator[tuple[Any, str]]:
    own = {}
    for attribute, held in list(vars(module).items()):
        if isinstance(held, _Keeping):
            yield module, attribute
        elif isinstance(held, type) and held.__module__ == name:
            own[id(held)] = held
    for held in own.values():
        yield from ((held, at) for at, kept in vars(held).items() if isinstance(kept, _Keeping))


def _anew(kept: Any) -> Callable[..., Any]:
    @functools.wraps(kept.__wrapped__)
    def asked(*args: Any, **kwargs: Any) -> Any:
        return (kept.__wrapped__ if _has_size((args, kwargs)) else kept)(*args, **kwargs)

    for name in ("cache_clear", "cache_info", "cache_parameters"):
        setattr(asked, name, getattr(kept, name))
    return asked


def _has_size(given: Any) -> bool:
    if isinstance(given, dict):
        return any(map(_has_size, given.values()))
    return any(map(_has_size, given)) if isinstance(given, (tuple, list)) else isinstance(given, (SizeInt, SizeFloat))
