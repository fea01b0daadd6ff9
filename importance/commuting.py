"""Which operators commute with a change of basis of a residual stream, one small rule for each kind.

A rule is told the node and those of its operands that have the stream's channels; it says what the result is to the stream (None
where it has no channels left), or refuses with the place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from depgraph.operators import by_name
from depgraph.rules.domains import MOVES
from importance.stream_parts import Norm, State, name_of, where

if TYPE_CHECKING:
    from importance.streams import Reading

_JOINS = frozenset(["cat", "concat", "concatenate", "stack", "hstack", "vstack"])
_RESAMPLES = frozenset(f"upsample_{way}" for way in ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d"))
PASSING = (
    _RESAMPLES
    | {f"_{name}_aa" for name in _RESAMPLES}
    | (frozenset(name.removeprefix("aten.") for name in MOVES) - {"sort"})
    | _JOINS
    | {"dropout", "getitem"}
)
_SUMS = frozenset(["sum", "mean"])
_PLACES = frozenset(["index_add", "index_add_", "index_put", "index_put_", "index_copy", "index_copy_", "scatter_add"])
TABLES = frozenset(["embedding", "embedding_bag"])
LENDING = frozenset(
    ["type_as", "expand_as", "view_as", "reshape_as"]
)  # what they are given second lends its dtype or shape
ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])
JOINING = _JOINS | {"add", "sub", "where"} | {name for name in _PLACES if not name.endswith("_")}


def _pass(reading: Reading, node: Node, on: list[Node]) -> State | None:
    """Positions are moved about, chosen or joined; the stream stays what it is."""
    states = [reading.states.get(n) for n in on]
    first = states[0]
    if len(on) == 1 and first is not None:
        return replace(first)
    reading.vectors(node, on)
    return State("vector", node)


def _add(reading: Reading, node: Node, on: list[Node]) -> State | None:
    moving = [n for n in on if n in reading.moving]
    state = reading.states[moving[0]] if moving else None
    if len(node.all_input_nodes) > len(on) or len(node.args) < 2 or not all(isinstance(n, Node) for n in node.args[:2]):
        return _offset(reading, node, on)
    if len(moving) == 1 and len(on) == 2 and state is not None and state.kind == "scaled":
        static = next(n for n in on if n not in reading.moving)
        if state.norm is None or state.norm.shift is not None or name_of(node) != "add":
            raise reading.refuse(node, f"adds to {reading.told(moving[0])}")
        return State("scaled", node, replace(state.norm, shift=static))
    reading.vectors(node, on)
    return State("vector", node)


def _offset(reading: Reading, node: Node, on: list[Node]) -> State | None:
    """The same number is added to all channels: a mean that is subtracted. Bases in which they weigh the same keep it."""
    other = [n for n in node.args[:2] if n not in on]
    if other == [0] or other == [0.0]:
        return _pass(reading, node, on)
    if not other or not isinstance(other[0], Node) or other[0] not in reading.moving:
        raise reading.refuse(node, "adds a number to every channel of it")
    reading.vectors(node, on)
    reading.stream.centred = True
    return State("vector", node)


def _multiply(reading: Reading, node: Node, on: list[Node]) -> State | None:
    if len(on) == 1 and len(node.all_input_nodes) == 1 and list(node.args[:2]).count(on[0]) == 2:
        reading.vectors(node, on)
        return State("squares", node)
    if len(on) == 1:
        if on[0] not in reading.moving:
            raise reading.refuse(node, "multiplies a weight on its channels with data")
        if name_of(node).startswith("div") and node.args[0] is not on[0]:
            raise reading.refuse(node, "divides by every channel of it")
        state = reading.states[on[0]]
        if state.norm is not None and state.norm.shift is not None:
            raise reading.refuse(node, f"multiplies {reading.told(on[0])}")
        return State(state.kind, node, state.norm)
    static = [n for n in on if n not in reading.moving]
    if len(static) != 1 or not name_of(node).startswith("mul"):
        raise reading.refuse(node, "acts on every channel of it by itself")
    moving = next(n for n in on if n in reading.moving)
    reading.vectors(node, [moving])
    return State("scaled", node, Norm(where(node), scale=static[0], of=reading.written_alone(moving)))


def _together(reading: Reading, node: Node, on: list[Node]) -> State | None:
    """Vectors of the stream make another."""
    reading.vectors(node, on)
    return State("vector", node)


def _power(reading: Reading, node: Node, on: list[Node]) -> State | None:
    if name_of(node) != "square" and node.args[1] != 2:
        raise reading.refuse(node, "takes a power of every channel of it")
    reading.vectors(node, on)
    return State("squares", node)


def _reduce(reading: Reading, node: Node, on: list[Node]) -> State | None:
    """Over positions the stream goes on; over its own channels only the mean, or the sum of squares, stays what it is."""
    state = reading.states[on[0]]
    if reading.along(node) is not None:
        if state.norm is not None and (state.norm.shift is None or name_of(node) == "mean"):
            return State(state.kind, node, state.norm)
        reading.vectors(node, on)
        return State("vector", node)
    if state.kind == "scaled":
        raise reading.refuse(node, f"sums up {reading.told(on[0])}")
    if not _over_last_only(reading, node, on[0]):
        raise reading.refuse(node, "sums over it and something else at once")
    reading.stream.centred = reading.stream.centred or state.kind == "vector"
    return None


def _over_last_only(reading: Reading, node: Node, given: Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    rank = len(reading.program.values[given.name].shape)
    listed = list(dims) if isinstance(dims, (list, tuple)) else [dims] if isinstance(dims, int) else range(rank)
    return [d % rank for d in listed] == [reading.along(given)]


def _spread(reading: Reading, node: Node, on: list[Node]) -> State | None:
    reading.vectors(node, on)
    if reading.along(node) is not None or not _over_last_only(reading, node, on[0]):
        raise reading.refuse(node, "takes the variance of every channel of it")
    reading.stream.centred = True
    return None


def _length(reading: Reading, node: Node, on: list[Node]) -> State | None:
    reading.vectors(node, on)
    order = node.args[1] if len(node.args) > 1 else 2
    over = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    rank = len(reading.program.values[on[0].name].shape)
    listed = list(over) if isinstance(over, (list, tuple)) else [over] if isinstance(over, int) else range(rank)
    if order != 2 or [d % rank for d in listed] != [reading.along(on[0])]:
        raise reading.refuse(node, "takes another length than the Euclidean one of all its channels")
    return None


def _normalise(reading: Reading, node: Node, on: list[Node]) -> State | None:
    """A layer or RMS norm in one operator."""
    given: Any = node.args[0]
    reading.vectors(node, [given])
    own = by_name(node)
    if list(own["normalized_shape"] or ()) != [reading.axis.size]:
        raise reading.refuse(node, "normalises it together with something else")
    reading.stream.centred = reading.stream.centred or "rms" not in name_of(node)
    scale, shift = (n if isinstance(n := own.get(name), Node) else None for name in ("weight", "bias"))
    if any(n in reading.moving for n in (scale, shift) if n is not None):
        raise reading.refuse(node, "scales it by what is computed from data")
    if scale is None and shift is None:
        return State("vector", node)
    return State("scaled", node, Norm(where(node), scale, shift))


def _table(reading: Reading, node: Node, on: list[Node]) -> State | None:
    if on != [node.args[0]] or on[0] in reading.moving:
        raise reading.refuse(node, "looks something up by the channels of it")
    reading.writes(node, on[0])
    return State("vector", node)


def _choose(reading: Reading, node: Node, on: list[Node]) -> State | None:
    """Between vectors of the stream, or one and zeros, by a mask that has no channels."""
    numbers = [n for n in node.args[1:] if isinstance(n, (int, float))]
    mask = node.args[1] if name_of(node) == "masked_fill" else node.args[0]
    others = [n for n in node.args if isinstance(n, Node) and n not in on and n is not mask]
    if mask in on or any(numbers) or others:
        raise reading.refuse(node, "masks its channels, or puts other numbers in")
    reading.vectors(node, on)
    return State("vector", node)


def _nothing(reading: Reading, node: Node, on: list[Node]) -> State | None:
    """Only the shape of the stream is looked at."""
    return State("vector", node) if reading.along(node) is not None else None


_Act = Callable[["Reading", Node, list[Node]], State | None]
ACTS: dict[str, _Act] = {
    **dict.fromkeys(PASSING, _pass),
    **dict.fromkeys((*_PLACES, "neg"), _together),
    **dict.fromkeys(_SUMS, _reduce),
    **dict.fromkeys(TABLES, _table),
    **dict.fromkeys(ZEROS, _nothing),
    **dict.fromkeys(("add", "add_", "sub", "sub_"), _add),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _multiply),
    **dict.fromkeys(("pow", "square"), _power),
    **dict.fromkeys(("var", "var_mean", "std"), _spread),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _length),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _normalise),
    **dict.fromkeys(("where", "masked_fill", "masked_fill_"), _choose),
}
