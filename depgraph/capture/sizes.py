"""Integers that remember where they came from.

A `SizeInt` is an `int` with an expression (`expressions.py`); its arithmetic gives integers and floats that carry the
expression on. It may stand wherever an `int` may. While nothing observes (`observing`), arithmetic gives plain numbers,
so a `SizeInt` left behind in a cache does no harm. What Python itself makes of an integer is out of reach: `int(x)`,
`len(x)` and `range(x)` give plain integers, `math.sqrt(x)` a plain float (reported to the observer as a leak).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from depgraph.capture.expressions import (
    Attr,
    Const,
    Expr,
    Op,
    ShapeOf,
    attributes,
    combine,
    describe,
    evaluate,
)

__all__ = [
    "Attr",
    "Const",
    "Expr",
    "Observer",
    "Op",
    "ShapeOf",
    "SizeFloat",
    "SizeInt",
    "attributes",
    "describe",
    "evaluate",
    "observing",
    "plain",
    "tracked_extreme",
    "tracked_product",
    "tracked_root",
]

_MAX_DEPTH = 48  # a counter carried through a long loop would grow without end


class Observer(Protocol):
    """What is told about the sizes while it observes."""

    def compared(self, left: Expr, right: Expr, equal: bool) -> None:
        """Two sizes met in `==` or `!=`; `equal` says whether they were equal."""

    def ordered(self, name: str, left: Expr, right: Expr) -> None:
        """Two sizes that are equal met in an order, by its name in `operator`."""

    def leaked(self, expr: Expr) -> None:
        """A size became a float: what follows may lose the expression."""

    def recovered(self, expr: Expr) -> None:
        """The float `expr` became an integer again: it, and what it was computed from, leaked nothing."""

    def converted(self, expr: Expr, value: int) -> None:
        """`int()` made a plain integer of a size: Python lets no subclass through."""

    def symbolic(self, name: str, value: int, expr: Expr) -> None:
        """A size met a symbolic integer of torch in operator `name`."""


_observer: Observer | None = None


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Let `observer` hear of comparisons and leaks; without one, arithmetic gives plain numbers."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


class _Carrier:
    """What `SizeInt` and `SizeFloat` share: the expression, and that copies of them are plain numbers."""

    expr: Expr
    depth: int

    def __new__(cls, value: Any, expr: Expr, depth: int = 0) -> Any:
        self = super().__new__(cls, value)  # type: ignore[call-arg]
        self.expr = expr
        self.depth = depth
        return self

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        number = plain(self)
        return type(number), (number,)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, tuple[Any]]:
        return self.__reduce__()

    def __copy__(self) -> Any:
        return plain(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain(self)


class SizeInt(_Carrier, int):
    """An `int` that carries the expression it was computed from."""

    def __eq__(self, other: object) -> Any:
        return _compare(self, other, equal=True)

    def __ne__(self, other: object) -> Any:
        return _compare(self, other, equal=False)

    __hash__ = int.__hash__

    def __lt__(self, other: object) -> Any:
        return _order("lt", self, other)

    def __le__(self, other: object) -> Any:
        return _order("le", self, other)

    def __gt__(self, other: object) -> Any:
        return _order("gt", self, other)

    def __ge__(self, other: object) -> Any:
        return _order("ge", self, other)

    def __pos__(self) -> int:
        return self

    def __trunc__(self) -> int:
        return self

    def __floor__(self) -> int:
        return self

    def __ceil__(self) -> int:
        return self

    def __round__(self, digits: int | None = None) -> int:  # type: ignore[override]
        return self if digits is None or digits >= 0 else int.__round__(self, digits)

    def __int__(self) -> int:
        return _converted(self.expr, int.__int__(self))

    def __float__(self) -> float:
        if _observer is not None:
            _observer.leaked(self.expr)
        return int.__float__(self)

    def item(self) -> int:
        """Itself, as numpy's whole numbers have it."""
        return self

    def astype(self, kind: Any) -> Any:
        """Itself, or what numpy makes of it."""
        return self if kind is int else np.int64(int.__int__(self)).astype(kind)

    def __divmod__(self, other: Any) -> Any:
        quotient = self // other
        return NotImplemented if quotient is NotImplemented else (quotient, self % other)

    def __rdivmod__(self, other: Any) -> Any:
        quotient = other // self
        return NotImplemented if quotient is NotImplemented else (quotient, other % self)


class SizeFloat(_Carrier, float):
    """A `float` that carries the expression it was computed from; rounding it gives a `SizeInt`."""

    def __int__(self) -> int:
        _recover(self)
        return _converted(Op("int", (self.expr,)), float.__int__(self))

    def __round__(self, digits: int | None = None) -> Any:  # type: ignore[override]
        return self._rounded("round", float.__round__(self)) if digits is None else float.__round__(self, digits)

    def __floor__(self) -> int:
        return self._rounded("floor", float.__floor__(self))

    def __ceil__(self) -> int:
        return self._rounded("ceil", float.__ceil__(self))

    def __trunc__(self) -> int:
        return self._rounded("trunc", float.__trunc__(self))

    def _rounded(self, name: str, value: int) -> int:
        _recover(self)
        return _carry(name, value, self)


def plain(value: Any) -> Any:
    """`value` as an ordinary `int` or `float`, anything else as it is."""
    if isinstance(value, SizeInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, SizeFloat) else value


def tracked_extreme(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """`max` or `min` (by `name`) that keeps the expression when its arguments are integers and one is a `SizeInt`."""

    def extreme(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if len(args) < 2 or kwargs or not isinstance(result, int) or not any(type(arg) is SizeInt for arg in args):
            return result
        return _carry(name, plain(result), *args) if all(isinstance(arg, int) for arg in args) else result

    return extreme


def tracked_product(original: Callable[..., Any]) -> Callable[..., Any]:
    """`numpy.prod` that keeps the expression of a sequence of whole numbers, if one is a `SizeInt`."""

    def product(*args: Any, **kwargs: Any) -> Any:
        items = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], (list, tuple)) else ()
        if not any(type(item) is SizeInt for item in items) or not all(isinstance(item, int) for item in items):
            return original(*args, **kwargs)
        return math.prod(items)

    return product


def tracked_root(original: Callable[..., Any]) -> Callable[..., Any]:
    """`numpy.sqrt` that keeps the expression of a `SizeInt`."""

    def root(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x**0.5 if type(x) is SizeInt and not args and not kwargs else original(x, *args, **kwargs)

    return root


def _expr_of(value: int | float) -> Expr:
    return value.expr if isinstance(value, (SizeInt, SizeFloat)) else Const(value)


def _carry(name: str, value: Any, *operands: Any) -> Any:
    """`value` with the expression `name(operands)`; a plain number when nobody observes or it is too deep."""
    depth = 1 + max(getattr(operand, "depth", 0) for operand in operands)
    if _observer is None or depth > _MAX_DEPTH or not isinstance(value, (int, float)):
        return value
    expr = combine(name, *(_expr_of(operand) for operand in operands))
    if isinstance(value, int):
        return SizeInt(value, expr, depth)
    if not any(isinstance(operand, SizeFloat) for operand in operands):
        _observer.leaked(expr)
    return SizeFloat(value, expr, depth)


def _recover(value: SizeFloat) -> None:
    if _observer is not None:
        _observer.recovered(value.expr)


def _converted(expr: Expr, value: int) -> int:
    if _observer is not None:
        _observer.converted(expr, value)
    return value


def _compare(size: SizeInt, other: object, equal: bool) -> Any:
    if isinstance(other, (torch.SymInt, torch.SymFloat)):
        return (plain(size) == other) if equal else (plain(size) != other)
    same = int.__eq__(size, other)
    if same is NotImplemented:
        return NotImplemented
    if _observer is not None and isinstance(other, int):
        _observer.compared(size.expr, _expr_of(other), same)
    return same is equal


def _order(name: str, size: SizeInt, other: object) -> Any:
    if _observer is not None and isinstance(other, int) and int.__eq__(size, other):
        _observer.ordered(name, size.expr, _expr_of(other))
    return getattr(int, f"__{name}__")(size, other)


def _binary(name: str, function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if isinstance(other, (int, float)):
            left, right = (other, self) if swapped else (self, other)
            return _carry(name, function(plain(left), plain(right)), left, right)
        if isinstance(other, (torch.SymInt, torch.SymFloat)):  # these know exact ints and floats only
            if _observer is not None and isinstance(self, SizeInt):
                _observer.symbolic(function.__name__, plain(self), self.expr)
            return function(other, plain(self)) if swapped else function(plain(self), other)
        return NotImplemented

    return method


def _unary(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: _carry(name, function(plain(self)), self)


_ARITHMETIC = {
    "add": ("+", operator.add),
    "sub": ("-", operator.sub),
    "mul": ("*", operator.mul),
    "floordiv": ("//", operator.floordiv),
    "mod": ("%", operator.mod),
    "truediv": ("/", operator.truediv),
    "pow": ("**", operator.pow),
}
_BITWISE = {
    "lshift": ("<<", operator.lshift),
    "rshift": (">>", operator.rshift),
    "and": ("&", operator.and_),
    "or": ("|", operator.or_),
    "xor": ("^", operator.xor),
}


def _install(cls: type, table: dict[str, tuple[str, Callable[[Any, Any], Any]]]) -> None:
    for stem, (symbol, function) in table.items():
        setattr(cls, f"__{stem}__", _binary(symbol, function, swapped=False))
        setattr(cls, f"__r{stem}__", _binary(symbol, function, swapped=True))


_install(SizeInt, {**_ARITHMETIC, **_BITWISE})
_install(SizeFloat, _ARITHMETIC)
for _class in (SizeInt, SizeFloat):
    _class.__neg__ = _unary("neg", operator.neg)  # type: ignore[method-assign]
    _class.__abs__ = _unary("abs", abs)  # type: ignore[method-assign]
