"""Where the source of a model compares or slices by an integer that a cut changes, and the example doesn't go by it.

One integer may have two roles: a width, and the longest sequence. What the example runs is checked; the rest is read here, in
the source alone, for a note.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from depgraph.capture.frames import shown
from depgraph.capture.sizes import Attr, attributes

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_BUILDING = frozenset(["__init__", "__repr__", "extra_repr", "reset_parameters", "_init_weights"])


class Read(NamedTuple):
    """A comparison or slice by an attribute of `self` in a source file, from line `first` to `last`."""

    name: str
    what: str
    file: str
    first: int
    last: int


def other_reads(graph: DependencyGraph, changed: Mapping[Attr, int]) -> list[str]:
    """A note for every comparison or slice by a changed attribute that no recorded size or comparison stands for."""
    seen = _seen(graph)
    found: dict[str, None] = {}
    for attr, after in changed.items():
        kind: Any = type(graph.model.get_submodule(attr.module))
        for read in _reads(kind) if not attr.keys else ():
            lines = {f"{read.file}:{line}" for line in range(read.first, read.last + 1)}
            if read.name == attr.name and not lines & seen.get(attr, frozenset()):
                text = f"{kind.__name__} {read.what} {attr.name} at {read.file}:{read.first}, which the example doesn't go by"
                found[f"{text}: it is {after} now, look whether that is right there"] = None
    return list(found)


def _seen(graph: DependencyGraph) -> dict[Attr, set[str]]:
    """By attribute, the lines at which a size came from it or it was compared."""
    recording, found = graph.capture.recording, dict[Attr, set[str]]()
    sited = [(site.expr, site.where) for site in recording.sites]
    compared = [(side, c.where) for c in recording.comparisons for side in (c.left, c.right)]
    compared += [(side, o.where) for o in recording.orders for side in (o.left, o.right)]
    for expr, where in (*sited, *compared):
        for attr in attributes(expr) if expr is not None else ():
            found.setdefault(attr, set()).add(where)
    return found


@cache
def _reads(kind: Any) -> tuple[Read, ...]:
    """The comparisons and slices by attributes in the methods of a class that compute something."""
    found: list[Read] = []
    for base in kind.__mro__:
        if not issubclass(base, nn.Module) or base.__module__.split(".")[0] == "torch":
            continue
        for name, method in vars(base).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None and name not in _BUILDING:
                found += _in_method(code)
    return tuple(found)


def _in_method(code: CodeType) -> Iterator[Read]:
    try:
        begin, file = code.co_firstlineno, shown(code.co_filename)
        lines = inspect.getblock(linecache.getlines(code.co_filename)[begin - 1 :])
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (SyntaxError, tokenize.TokenError):
        return
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare) and not any(isinstance(one, ast.Constant) for one in node.comparators):
            parts, what = [node.left, *node.comparators], "compares by"
        elif isinstance(node, ast.Slice):
            parts, what = [part for part in (node.lower, node.upper) if part is not None], "slices by"
        for part in parts:
            for name in _own_names(part):
                yield Read(name, what, file, begin + node.lineno - 1, begin + (node.end_lineno or node.lineno) - 1)  # type: ignore[attr-defined]


def _own_names(part: ast.expr) -> Iterator[str]:
    """The attributes of `self` that an expression reads."""
    for node in ast.walk(part):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr
