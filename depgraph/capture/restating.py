"""Modules that are copied and pickled by a state of their own: what that makes an integer from follows the integer.

Such a module keeps what it was made with, and computes from that, when it is copied, what its forward reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

_MAX_DEPTH = 4
Undo = Callable[[], None]


def restate(module: nn.Module, read: Callable[[nn.Module], Any], before: int) -> list[Undo]:
    """Let a copy of `module` hold what it holds itself by `read`, where that was `before`; gives what takes it back.

    Nothing is done where a copy does, and where no integer of the state alone brings it about.
    """
    if not _has_state(module) or _copied(module, read) in (None, read(module)):
        return []
    value = read(module)
    for container, key in list(_integers(module.__getstate__(), 0)):
        if container[key] != before:
            continue
        container[key] = value
        if _copied(module, read) == value:
            return [partial(container.__setitem__, key, before)]
        container[key] = before
    return []


def _has_state(module: nn.Module) -> bool:
    """Does its class, or one that it derives from before torch's, say what its state is?"""
    kinds = type(module).__mro__
    own = kinds[: kinds.index(nn.Module)]
    return all(any(name in vars(kind) for kind in own) for name in ("__getstate__", "__setstate__"))


def _copied(module: nn.Module, read: Callable[[nn.Module], Any]) -> Any:
    """What a copy made by the state holds; None where that can't be told."""
    try:
        copied = type(module).__new__(type(module))
        copied.__setstate__(module.__getstate__())
        return read(copied)
    except Exception:  # a module may be made in ways that nobody foresees
        return None


def _integers(held: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Containers of a state and the keys at which they hold integers."""
    if depth > _MAX_DEPTH or not isinstance(held, (dict, list)):
        return
    for key, value in held.items() if isinstance(held, dict) else enumerate(held):
        if type(value) is int:
            yield held, key
        else:
            yield from _integers(value, depth + 1)
