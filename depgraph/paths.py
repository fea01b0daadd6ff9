"""Paths of modules, such as `layers.0.mlp`: which lies in which."""

from __future__ import annotations

import os
from collections.abc import Iterable


def is_in(path: str, outer: str) -> bool:
    """Is a module another one, or does it lie in that? All lie in the whole model, which has no name."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def around(path: str) -> list[str]:
    """The modules that a module lies in, itself and the whole model included."""
    parts = path.split(".") if path else []
    return [".".join(parts[:k]) for k in range(len(parts) + 1)]


def common_path(paths: Iterable[str]) -> str:
    """The deepest module that all of the named ones are, or lie in."""
    return ".".join(os.path.commonprefix([path.split(".") for path in set(paths)]))
