"""Size arguments after a cut: what each captured operator must be called with once its dims are narrower.

One small function an operator, in a table (`resizing.py`, `recounting.py`). Each gets the operator's arguments by schema
name and says which of them change; an operator that isn't in the table has no argument that depends on a size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from torch.fx import Node

from depgraph.graph import Value
from depgraph.operators import by_name
from depgraph.widths import Kept


class Share(NamedTuple):
    """A size that the graph computes, times what is left of it."""

    size: Node
    left: Fraction


@dataclass
class Sized:
    """One captured operator under a cut: its arguments by schema name, and the kept indices of its tensors."""

    node: Node
    arguments: dict[str, Any]
    source: Value | None
    outputs: list[Value]
    kept: Kept
    changes: dict[str, Any] = field(default_factory=dict)
    target: Any = None

    def indices(self, value: Value, d: int) -> np.ndarray:
        """Kept indices of a dim, ascending."""
        kept = self.kept.of(value, d)
        return np.arange(value.shape[d]) if kept is None else kept

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.kept.shape(value)

    def narrowed(self, value: Value, d: int) -> bool:
        return self.kept.of(value, d) is not None

    def set_sizes(self, name: str, value: Value) -> None:
        """A list of sizes, one for each dim of `value`; sizes of dims that keep all indices stay as they were written."""
        old = list(self.arguments[name])
        offset = len(value.shape) - len(old)
        new = [
            size if size == -1 or not self.narrowed(value, d + offset) else self.size(size, value, d + offset)
            for d, size in enumerate(old)
        ]
        if new != old:
            self.changes[name] = new

    def size(self, size: Any, value: Value, d: int) -> Any:
        """The size of a dim after the cut; of one that holds the batch too (a size that is computed), the share that stays."""
        after, before = self.kept.size(value.dim(d)), value.shape[d]
        return Share(size, Fraction(after, before)) if isinstance(size, Node) else after


Rewrite = Callable[[Sized], None]
_TABLE: dict[str, Rewrite] = {}


def rewrites(*names: str, of: str = "aten") -> Callable[[Rewrite], Rewrite]:
    """Put a function into the table, for operators of these names: ATen's, or those `of` another namespace."""

    def register(function: Rewrite) -> Rewrite:
        for name in names:
            _TABLE[f"{of}.{name}"] = function
        return function

    return register


class Prepared(NamedTuple):
    """All that is known of an operator before a cut: what says what changes, and its tensors."""

    node: Node
    function: Rewrite
    arguments: dict[str, Any]
    source: Value | None
    outputs: list[Value]


def prepare(node: Node, values: dict[str, Value], actual: Node | None = None) -> Prepared | None:
    """Look an operator up; None where none of its arguments depends on a size.

    `actual` is the same operator in another capture (with symbolic sizes): its arguments are the ones to change.
    """
    target = str(node.target)
    function = _TABLE.get(target) or _TABLE.get(target.rsplit(".", 1)[0])
    if function is None:
        return None
    arguments = by_name(node)
    first = next((a for a in arguments.values() if isinstance(a, Node)), None)
    source = values.get(first.name) if first is not None else None
    many = isinstance(node.meta.get("val"), (tuple, list))
    names = [f"{node.name}:{k}" for k in range(len(node.meta["val"]))] if many else [node.name]
    outputs = [values[n] for n in names if n in values]
    return Prepared(node, function, by_name(actual) if actual is not None else arguments, source, outputs)


def rewritten(prepared: Prepared | None, kept: Kept) -> Sized | None:
    """What an operator must be called with after a cut; None when it stays as it is."""
    if prepared is None:
        return None
    sized = Sized(prepared.node, prepared.arguments, prepared.source, prepared.outputs, kept)
    prepared.function(sized)
    return sized if sized.changes or sized.target is not None else None


def rewrite(node: Node, values: dict[str, Value], kept: Kept, actual: Node | None = None) -> Sized | None:
    """`rewritten` of what `prepare` finds."""
    return rewritten(prepare(node, values, actual), kept)


def call_arguments(sized: Sized, actual: Node | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The new arguments in call form, in the layout of the node's own where the operator is still the same."""
    if sized.target is not None:
        return tuple(sized.changes.values()), {}
    node = actual or sized.node
    declared = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    args = tuple(sized.changes.get(name, arg) for name, arg in zip(declared, node.args, strict=False))
    later = {name: new for name, new in sized.changes.items() if name not in declared[: len(node.args)]}
    return args, {**node.kwargs, **later}
