"""Hooks on one model for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(model: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]) -> Iterator[None]:
    """Within, `enter` runs before any other hook of `model`'s forward, and `leave` after it, even if it fails."""
    handles = [
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def while_running(model: nn.Module, mode: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within, each forward of `model` runs in a context that `mode` makes anew."""
    inside = ExitStack()

    def enter(module: nn.Module, args: Any) -> None:
        inside.enter_context(mode())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.close()

    with inside, hooked(model, enter, leave):
        yield
