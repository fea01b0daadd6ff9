"""Which integer of a Python call became which integer of a graph node.

torch's C++ argument parser turns a call such as `x.view(b, n, heads, size)` into an ATen node with plain integers. The
way back is their order: the node's integers are a subsequence of the call's, unless torch adds some of its own. Where
several places of the call would fit, all of them must agree on the expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from depgraph.capture.sizes import Expr, SizeFloat, SizeInt

Path = tuple[Any, ...]

EXPRESSION = "expression"
LITERAL = "literal"
IMPLICIT = "implicit"
SHAPES = "shapes"
UNKNOWN = "unknown"

_INT_MAX = 2**63 - 1
_INDEXING = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_FLATTENING = frozenset({torch.flatten, Tensor.flatten})
_FITTED = frozenset(["view", "reshape", "_unsafe_view", "expand"])  # how torch fits shapes by itself
_SLICE_ARGUMENTS = ("start", "end", "step")
_SLICE_DEFAULTS = (0, _INT_MAX, 1)


class Source(NamedTuple):
    """Where a number comes from: its expression if it has one, and the kind of evidence (one of the five words)."""

    expr: Expr | None
    origin: str


class Given(NamedTuple):
    """A number in a call's arguments; the value is None for a symbolic integer."""

    value: int | float | None
    expr: Expr | None


class Slot(NamedTuple):
    """A number in a graph node's arguments, with the name of its argument in the operator's schema."""

    path: Path
    value: int | float
    argument: str


class Python(NamedTuple):
    """A call as Python made it.

    `lost` holds the integers that the calling function got from `int(size)`, with the expressions that Python dropped.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    lost: dict[int, set[Expr]]


def slots(node: torch.fx.Node) -> list[Slot]:
    """The integers and floats in `node`'s arguments, in order."""
    names = _argument_names(node.target)
    found: list[Slot] = []
    for position, value in enumerate(node.args):
        name = names[position] if position < len(names) else ""
        found.extend(Slot(path, number, name) for path, number in _numbers(value, ("args", position)))
    for name, value in node.kwargs.items():
        found.extend(Slot(path, number, name) for path, number in _numbers(value, ("kwargs", name)))
    return found


def sources(node: torch.fx.Node, call: Python) -> dict[Path, Source]:
    """The source of every number in `node`, which was made while `call` ran."""
    wanted = slots(node)
    if not wanted or not isinstance(node.target, torch._ops.OpOverload):
        return {}
    if call.function in (_INDEXING | _FLATTENING) and node.target.overloadpacket.__name__ in _FITTED:
        return {slot.path: Source(None, SHAPES) for slot in wanted}
    found = _indexed(node, wanted, call.args[1]) if call.function in _INDEXING else None
    if found is None:
        given = list(_given((call.args, call.kwargs)))
        if not given:
            return {slot.path: Source(None, SHAPES) for slot in wanted}
        numbers = [slot for slot in wanted if type(slot.value) is not float]
        found = _by_position(numbers, call, node) or _by_order(numbers, given, node)
        found |= {slot.path: _by_value(slot, given, node) for slot in wanted if slot.path not in found}
    return {slot.path: _found_again(found[slot.path], slot, call.lost) for slot in wanted} if call.lost else found


def given_expressions(arguments: Any) -> set[Expr]:
    """The expressions of all numbers in a call's arguments."""
    return {entry.expr for entry in _given(arguments) if entry.expr is not None}


def embeddings(short: Sequence[Any], long: Sequence[Any]) -> list[list[int]] | None:
    """For each item of `short` all positions in `long` it can have when `short` is a subsequence of `long`.

    None when it isn't one.
    """
    earliest = _greedy(short, long)
    backwards = _greedy(short[::-1], long[::-1])
    if earliest is None or backwards is None:
        return None
    latest = [len(long) - 1 - position for position in reversed(backwards)]
    return [
        [position for position in range(first, last + 1) if long[position] == item]
        for item, first, last in zip(short, earliest, latest, strict=True)
    ]


def _greedy(short: Sequence[Any], long: Sequence[Any]) -> list[int] | None:
    positions: list[int] = []
    start = 0
    for item in short:
        while start < len(long) and long[start] != item:
            start += 1
        if start == len(long):
            return None
        positions.append(start)
        start += 1
    return positions


def _by_position(wanted: list[Slot], call: Python, node: torch.fx.Node) -> dict[Path, Source]:
    """The sources where every number that isn't a default stands in the call just where it stands in the node."""
    found: dict[Path, Source] = {}
    for slot in wanted:
        _, first, *rest = slot.path
        value: Any = call.kwargs.get(slot.argument)
        if value is None and isinstance(first, int) and first < len(call.args):
            value = call.args[first]
        for position in rest:
            value = value[position] if isinstance(value, (tuple, list)) and position < len(value) else None
        if value is None and _is_default(slot, node):
            found[slot.path] = Source(None, IMPLICIT)
            continue
        if not _is_integer(value) or _one(value).value != slot.value:
            return {}
        expr = _one(value).expr
        found[slot.path] = Source(expr, LITERAL if expr is None else EXPRESSION)
    return found


def _by_order(wanted: list[Slot], given: list[Given], node: torch.fx.Node) -> dict[Path, Source]:
    numbers = [entry for entry in given if type(entry.value) is int]
    places = embeddings([slot.value for slot in wanted], [entry.value for entry in numbers])
    if places is None:
        return {}
    return {
        slot.path: _agreed([numbers[place] for place in positions], slot, node)
        for slot, positions in zip(wanted, places, strict=True)
    }


def _by_value(slot: Slot, given: list[Given], node: torch.fx.Node) -> Source:
    if slot.argument.startswith("dim"):
        return Source(None, IMPLICIT)
    same = [entry for entry in given if type(entry.value) is type(slot.value) and entry.value == slot.value]
    return _agreed(same, slot, node)


def _agreed(entries: list[Given], slot: Slot, node: torch.fx.Node) -> Source:
    if not entries:
        return Source(None, IMPLICIT if _is_default(slot, node) else UNKNOWN)
    expressions = {entry.expr for entry in entries}
    if len(expressions) > 1:
        return Source(None, UNKNOWN)
    (expr,) = expressions
    return Source(expr, LITERAL if expr is None else EXPRESSION)


def _found_again(source: Source, slot: Slot, lost: dict[int, set[Expr]]) -> Source:
    """`source`, unless it is a plain integer that the same function got from `int(size)`."""
    exprs = lost.get(slot.value, set()) if type(slot.value) is int else set()
    if source.origin != LITERAL or len(exprs) != 1 or slot.value < 2 or slot.argument.startswith("dim"):
        return source
    return Source(next(iter(exprs)), EXPRESSION)


def _indexed(node: torch.fx.Node, wanted: list[Slot], index: Any) -> dict[Path, Source] | None:
    """The sources of a `select` or `slice` node that came from `x[index]`, None when it isn't such a node."""
    items = index if isinstance(index, tuple) else (index,)
    by_name = {slot.argument: slot for slot in wanted}
    if node.target is torch.ops.aten.select.int and "index" in by_name:
        given = [_one(item) for item in items if _is_integer(item)]
        chosen = {"index": [entry for entry in given if entry.value == by_name["index"].value]}
    elif node.target is torch.ops.aten.slice.Tensor:
        slices = [_slice(item) for item in items if isinstance(item, slice)]
        ends = tuple(_slice_value(node, position, by_name) for position in range(3))
        fitting = [entry for entry in slices if tuple(part.value for part in entry) == ends]
        chosen = {name: [entry[at] for entry in fitting] for at, name in enumerate(_SLICE_ARGUMENTS)}
    else:
        return None
    return {slot.path: _agreed_part(chosen.get(name, []), slot, node) for name, slot in by_name.items()}


def _agreed_part(entries: list[Given], slot: Slot, node: torch.fx.Node) -> Source:
    if slot.argument == "dim":
        return Source(None, IMPLICIT)
    if _is_default(slot, node) and all(entry.expr is None for entry in entries):
        return Source(None, IMPLICIT)
    return _agreed(entries, slot, node)


def _slice(item: slice) -> tuple[Given, ...]:
    parts = (item.start, item.stop, item.step)
    return tuple(
        Given(default, None) if part is None else _one(part)
        for part, default in zip(parts, _SLICE_DEFAULTS, strict=True)
    )


def _slice_value(node: torch.fx.Node, position: int, by_name: dict[str, Slot]) -> int | float | None:
    slot = by_name.get(_SLICE_ARGUMENTS[position])
    if slot is not None:
        return slot.value
    at = position + 2  # after the tensor and the dim
    return None if at < len(node.args) and node.args[at] is not None else _SLICE_DEFAULTS[position]


def _is_default(slot: Slot, node: torch.fx.Node) -> bool:
    if node.target is torch.ops.aten.slice.Tensor and slot.argument in _SLICE_ARGUMENTS:
        return slot.value == _SLICE_DEFAULTS[_SLICE_ARGUMENTS.index(slot.argument)]
    schema = getattr(node.target, "_schema", None)
    arguments = [] if schema is None else [entry for entry in schema.arguments if entry.name == slot.argument]
    return any(slot.value == default or _holds(default, slot.value) for default in (a.default_value for a in arguments))


def _holds(default: Any, value: int | float) -> bool:
    return isinstance(default, (list, tuple)) and value in default


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _one(value: Any) -> Given:
    if isinstance(value, SizeInt):
        return Given(int.__int__(value), value.expr)
    return Given(value if type(value) is int else None, None)


def _given(value: Any) -> Iterator[Given]:
    """All numbers in a call's arguments, depth first; floats only where they carry an expression."""
    kind = type(value)
    if kind is int or kind is SizeInt:
        yield _one(value)
    elif kind is SizeFloat:
        yield Given(float.__float__(value), value.expr)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _given(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _given(item)
    elif kind is slice:
        yield from _given((value.start, value.stop, value.step))


def _numbers(value: Any, path: Path) -> Iterator[tuple[Path, int | float]]:
    if type(value) in (int, float):
        yield path, value
    elif isinstance(value, SizeInt):
        yield path, int.__int__(value)
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from _numbers(item, (*path, position))


def _argument_names(target: Any) -> list[str]:
    schema = getattr(target, "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]
