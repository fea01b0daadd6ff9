"""From which modules a graph form comes: its own modules only hold tensors, but each of its nodes remembers where it stood."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule, Node

Stack = dict[str, tuple[str, Any]]
"""The modules in which a node was computed, the outermost first: path and class by a key of torch's."""


class Origins:
    """Tells, while a graph form runs, what the node remembers whose line of code runs."""

    def __init__(self, model: Any) -> None:
        graph_form = isinstance(model, GraphModule)
        self._code = type(model).forward.__code__ if graph_form else None
        self._node_at = getattr(model, "_lineno_map", None) or {}
        self._metas = [node.meta for node in model.graph.nodes] if graph_form else []

    def stack(self) -> Stack | None:
        """The modules that the running node comes from; None where nothing is remembered, as in any other model."""
        if self._code is None:
            return None
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not self._code:
            frame = frame.f_back  # type: ignore[assignment]
        number = None if frame is None else self._node_at.get(frame.f_lineno - self._code.co_firstlineno)
        return None if number is None else self._metas[number].get("nn_module_stack")


def entries_of(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Paths of the modules that were entries of containers, as far as nodes tell, in the order of execution.

    What holds them wasn't called itself, as a list isn't; or they are numbered, and there are others beside them.
    """
    called = classes_of(nodes)
    numbered = Counter(path.rpartition(".")[0] for path in called if path.rpartition(".")[2].isdigit())

    def is_entry(path: str) -> bool:
        holder, _, name = path.rpartition(".")
        return bool(holder) and holder not in called or name.isdigit() and numbered[holder] > 1

    return tuple(filter(is_entry, called))


def classes_of(nodes: Iterable[Node]) -> dict[str, str]:
    """What the modules that nodes come from were, by path: the names of their classes."""
    found = dict[str, str]()
    for node in nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            found.setdefault(path, kind if isinstance(kind, str) else kind.__qualname__)
    return found
