"""Which line of the user's code is running."""

from __future__ import annotations

import os
import sys
from types import CodeType

import torch

_HIDDEN = tuple(
    os.path.join(os.path.dirname(os.path.abspath(path)), "")
    for path in (torch.__file__, os.path.dirname(os.path.abspath(__file__)))
)
_names: dict[CodeType, str | None] = {}


def here() -> tuple[str, CodeType | None]:
    """`file.py:123` and the code of the innermost frame outside torch and this library.

    The file is relative to its import root.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        try:
            name = _names[code]
        except KeyError:
            name = _names[code] = _shown(code.co_filename)
        if name is not None:
            return f"{name}:{frame.f_lineno}", code
        frame = frame.f_back  # type: ignore[assignment]
    return "", None


def where() -> str:
    """`file.py:123` of the innermost frame outside torch and this library."""
    return here()[0]


def _shown(filename: str) -> str | None:
    """The name to show for `filename`, None for one to pass over."""
    path = os.path.abspath(filename)
    if filename.startswith("<frozen") or path.startswith(_HIDDEN):
        return None
    roots = [root for root in map(os.path.abspath, sys.path) if path.startswith(os.path.join(root, ""))]
    return os.path.relpath(path, max(roots, key=len)) if roots else filename
