"""Where in the user's code a captured operator stands."""

from __future__ import annotations

import re
from functools import lru_cache

from torch.fx import Node

from depgraph.capture.frames import shown

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@lru_cache(maxsize=1 << 14)
def _short(trace: str) -> str:
    frames = _FRAME.findall(trace)
    own = [(path, line) for path, line in frames if "/torch/" not in path.replace("\\", "/")]
    if not (own or frames):
        return ""
    path, line = (own or frames)[-1]
    return f"{shown(path)}:{line}"


def place(node: Node) -> str:
    """`file.py:line` of the innermost frame outside torch, or an empty string."""
    if "place" in node.meta:
        return str(node.meta["place"])
    trace = node.meta.get("stack_trace")
    return _short(trace) if trace else ""


def module_path(node: Node) -> str:
    """The dotted path of the module whose forward made the node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(list(stack.values())[-1][0])
