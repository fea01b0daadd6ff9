"""Where a size comes from, as a small expression over module attributes and tensor shapes.

`Attr("layers.0.attn", "head_dim")` is an integer held by a module, `ShapeOf("linear", 2)` the size of a dim of a graph
node's tensor, `Const` a number written in the code, `Op` an operator applied to these. Expressions are immutable and
hashable; `evaluate` gives their value once attributes and shapes have new values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Attr:
    """An integer reachable from a module: `module` is its path in the model, `name` an entry of its `vars`.

    `keys` lead on from there: positions in lists and tuples, keys of dicts, attribute names of plain objects (configs).
    """

    module: str
    name: str
    keys: tuple[int | str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShapeOf:
    """The size of dim `dim` (never negative) of the tensor made by graph node `node`, parameters included."""

    node: str
    dim: int


@dataclass(frozen=True, slots=True)
class Const:
    """A number that no attribute and no shape supplies."""

    value: int | float


@dataclass(frozen=True, slots=True)
class Op:
    """Operator `name` (a key of `OPERATORS`) applied to `operands`."""

    name: str
    operands: tuple[Expr, ...]


Expr = Attr | ShapeOf | Const | Op
Leaf = Attr | ShapeOf
Number = int | float

OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "/": operator.truediv,
    "**": operator.pow,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "neg": operator.neg,
    "abs": abs,
    "max": max,
    "min": min,
    "int": int,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
}

_PRECEDENCE = {"|": 1, "^": 2, "&": 3, "<<": 4, ">>": 4, "+": 5, "-": 5, "*": 6, "//": 6, "%": 6, "/": 6, "**": 8}
_NEUTRAL_RIGHT: dict[str, Number] = {"+": 0, "-": 0, "*": 1, "//": 1, "**": 1}
_NEUTRAL_LEFT: dict[str, Number] = {"+": 0, "*": 1}


def combine(name: str, *operands: Expr) -> Expr:
    """The expression `name(operands)`, with `x + 0`, `x * 1`, `x // 1` and operations on constants folded."""
    if all(isinstance(operand, Const) for operand in operands):
        return Const(OPERATORS[name](*(operand.value for operand in operands)))  # type: ignore[union-attr]
    if len(operands) == 2:
        left, right = operands
        if name in _NEUTRAL_RIGHT and right == Const(_NEUTRAL_RIGHT[name]):
            return left
        if name in _NEUTRAL_LEFT and left == Const(_NEUTRAL_LEFT[name]):
            return right
    return Op(name, operands)


def evaluate(expr: Expr, lookup: Callable[[Leaf], int]) -> Any:
    """The value of `expr` when `lookup` supplies its attributes and shapes.

    An integer, unless a division or a power made it a float (a softmax scale of `head_dim ** -0.5`).

    Raises:
        ZeroDivisionError: a divisor became zero.
    """
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Op):
        return OPERATORS[expr.name](*(evaluate(operand, lookup) for operand in expr.operands))
    return lookup(expr)


def parts(expr: Expr) -> Iterator[Expr]:
    """`expr` and all expressions within it."""
    yield expr
    for operand in expr.operands if isinstance(expr, Op) else ():
        yield from parts(operand)


def leaves(expr: Expr) -> set[Leaf]:
    """All attributes and shapes in `expr`."""
    return {part for part in parts(expr) if isinstance(part, (Attr, ShapeOf))}


def attributes(expr: Expr) -> set[Attr]:
    """All attributes in `expr`."""
    return {leaf for leaf in leaves(expr) if isinstance(leaf, Attr)}


def renamed(expr: Expr, names: Callable[[str], str | None]) -> Expr | None:
    """`expr` with the node of every `ShapeOf` put through `names`; None where a node has no name any more."""
    if isinstance(expr, ShapeOf):
        name = names(expr.node)
        return None if name is None else ShapeOf(name, expr.dim)
    if not isinstance(expr, Op):
        return expr
    operands = tuple(renamed(operand, names) for operand in expr.operands)
    return None if None in operands else Op(expr.name, operands)  # type: ignore[arg-type]


def describe(expr: Expr) -> str:
    """`expr` as it might stand in the code: `attn.num_heads * linear.shape[2]`."""
    return _text(expr, 0)


def _text(expr: Expr, outer: int) -> str:
    if isinstance(expr, Attr):
        keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in expr.keys)
        return f"{expr.module or 'self'}.{expr.name}{keys}"
    if isinstance(expr, ShapeOf):
        return f"{expr.node}.shape[{expr.dim}]"
    if isinstance(expr, Const):
        return str(expr.value)
    if expr.name == "neg":
        return f"-{_text(expr.operands[0], 7)}"
    if expr.name not in _PRECEDENCE:
        return f"{expr.name}({', '.join(_text(operand, 0) for operand in expr.operands)})"
    own = _PRECEDENCE[expr.name]
    left_outer, right_outer = (own + 1, own) if expr.name == "**" else (own, own + 1)
    left, right = _text(expr.operands[0], left_outer), _text(expr.operands[1], right_outer)
    return f"({left} {expr.name} {right})" if own < outer else f"{left} {expr.name} {right}"
