"""Which line of the user's code is running."""

from __future__ import annotations

import os
import sys
from types import CodeType
from typing import NamedTuple

import torch

_TORCH, _OURS = (
    os.path.join(os.path.dirname(os.path.abspath(path)), "") for path in (torch.__file__, os.path.dirname(__file__))
)
_LAYERS = os.path.join(_TORCH, "nn", "modules", "")
_CALLER = os.path.join(_OURS, "capture", "recording.py")


class _Source(NamedTuple):
    """What a file is called ("" for one to pass over), and whether it is code of the model's own."""

    name: str
    own: bool


_names: dict[CodeType, _Source] = {}


def here() -> tuple[str, CodeType | None]:
    """`file.py:123` and the code of the innermost frame of the running model outside torch and this library.

    Where there is none, as in an `nn.Sequential` of standard layers, the line of the layer. The file is relative to its
    import root.
    """
    frame = sys._getframe(1)
    layer = ""
    while frame is not None and frame.f_code.co_filename != _CALLER:
        code = frame.f_code
        found = _names.get(code) or _remember(code)
        if found.own:
            return f"{found.name}:{frame.f_lineno}", code
        if not layer and found.name:
            layer = f"{found.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return layer, None


def _remember(code: CodeType) -> _Source:
    filename = code.co_filename
    own = not _is_hidden(filename)
    found = _Source(shown(filename) if own or filename.startswith(_LAYERS) else "", own)
    _names[code] = found
    return found


def where() -> str:
    """The place of `here`."""
    return here()[0]


def shown(filename: str) -> str:
    """A source file relative to its import root; its name alone where it has none."""
    path = os.path.abspath(filename)
    roots = [root for root in map(os.path.abspath, sys.path) if path.startswith(os.path.join(root, ""))]
    return os.path.relpath(path, max(roots, key=len)) if roots else os.path.basename(filename)


def _is_hidden(filename: str) -> bool:
    generated = filename.startswith("<") and not filename.startswith(("<stdin", "<ipython"))
    return generated or os.path.abspath(filename).startswith((_TORCH, _OURS))
