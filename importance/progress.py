"""A bar on stderr for what takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    """The items, with a bar that `what` stands before while they are gone through, if `progress` asks for one."""
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, console=Console(stderr=True), transient=True)
