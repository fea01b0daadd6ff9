"""Integers that remember where they came from."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depgraph.capture.expressions import combine, parts, renamed
from depgraph.capture.sizes import (
    Attr,
    Const,
    Expr,
    Op,
    ShapeOf,
    SizeFloat,
    SizeInt,
    attributes,
    describe,
    evaluate,
    observing,
    tracked_extreme,
)

HEADS = Attr("attn", "heads")
WIDTH = ShapeOf("x", 2)


class Ears:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.comparisons: list[tuple[Expr, Expr, bool]] = []
        self.leaks: list[Expr] = []
        self.conversions: list[tuple[Expr, int]] = []
        self.symbolics: list[tuple[str, int, Expr]] = []

    def compared(self, left: Expr, right: Expr, equal: bool) -> None:
        self.comparisons.append((left, right, equal))

    def leaked(self, expr: Expr) -> None:
        self.leaks.append(expr)

    def recovered(self, expr: Expr) -> None:
        self.leaks = [leak for leak in self.leaks if leak not in set(parts(expr))]

    def converted(self, expr: Expr, value: int) -> None:
        self.conversions.append((expr, value))

    def symbolic(self, name: str, value: int, expr: Expr) -> None:
        self.symbolics.append((name, value, expr))


@pytest.fixture
def ears() -> Iterator[Ears]:
    heard = Ears()
    with observing(heard):
        yield heard


def heads(value: int = 4) -> SizeInt:
    return SizeInt(value, HEADS)


def width(value: int = 32) -> SizeInt:
    return SizeInt(value, WIDTH)


@pytest.mark.usefixtures("ears")
@pytest.mark.parametrize(
    "compute",
    [
        lambda h, w: w // h,
        lambda h, w: w % h,
        lambda h, w: 3 * w + h - 1,
        lambda h, w: 100 - h,
        lambda h, w: 2**h,
        lambda h, w: h**2,
        lambda h, w: 1000 // h,
        lambda h, w: divmod(w, h)[0] + divmod(77, h)[1],
        lambda h, w: -h,
        lambda h, w: abs(-h),
        lambda h, w: w >> 1 << 2,
        lambda h, w: w & -w | 1 ^ h,
        lambda h, w: round(w / h),
        lambda h, w: math.ceil(w / 3),
        lambda h, w: math.floor(w * 0.25),
        lambda h, w: math.trunc(w / 3 * 2),
        lambda h, w: sum([h, w, 1]),
        lambda h, w: math.prod([h, w, 2]),
        lambda h, w: tracked_extreme("max", max)(h, w, 3),
        lambda h, w: tracked_extreme("min", min)(h, w),
        lambda h, w: round(w),
        lambda h, w: +w,
    ],
)
def test_arithmetic_carries_an_expression_that_follows_new_values(compute: Any) -> None:
    result = compute(heads(), width())
    assert isinstance(result, SizeInt)
    assert int(result) == compute(4, 32)
    assert evaluate(result.expr, {HEADS: 6, WIDTH: 54}.__getitem__) == compute(6, 54)


@pytest.mark.usefixtures("ears")
def test_division_and_powers_give_floats_with_an_expression() -> None:
    scale = (width() // heads()) ** -0.5
    assert isinstance(scale, SizeFloat)
    assert scale == 8**-0.5
    assert evaluate(scale.expr, {HEADS: 2, WIDTH: 32}.__getitem__) == 0.25
    assert (scale * 2).expr == Op("*", (scale.expr, Const(2)))


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 9))
def test_any_mixture_evaluates_to_what_python_computes(first: int, second: int, number: int) -> None:
    def mixture(a: int, b: int) -> int:
        return (a * number + b) // number - (b % number) * (a - number) + number**2

    with observing(Ears()):
        result = mixture(SizeInt(first, HEADS), SizeInt(second, WIDTH))
    assert result == mixture(first, second)
    assert evaluate(result.expr, {HEADS: second, WIDTH: first}.__getitem__) == mixture(second, first)


def test_without_an_observer_arithmetic_is_plain() -> None:
    assert type(heads() * 2) is int
    assert type(width() / heads()) is float


def test_it_is_an_int_to_everything_else() -> None:
    size = heads()
    assert isinstance(size, int)
    assert hash(size) == hash(4)
    assert {4: "four"}[size] == "four"
    assert f"{size:03d} {size}" == "004 4"
    assert json.dumps({"a": [size]}) == '{"a": [4]}'
    assert list(range(size)) == [0, 1, 2, 3]
    assert [7] * size == [7] * 4
    assert "abcdef"[size] == "e"
    assert np.zeros(size).shape == (4,)
    assert np.arange(10)[size] == 4
    assert math.sqrt(size) == 2.0
    assert bool(SizeInt(0, HEADS)) is False
    assert size > 3 >= SizeInt(3, WIDTH)


@pytest.mark.parametrize("value", [heads(), SizeFloat(0.5, HEADS)])
def test_copies_are_plain(value: Any) -> None:
    kind = type(value).__mro__[2]
    for twin in (copy.copy(value), copy.deepcopy([value])[0], pickle.loads(pickle.dumps(value))):
        assert type(twin) is kind
        assert twin == value


def test_equality_is_reported_and_order_is_not(ears: Ears) -> None:
    assert width() == 32
    assert width() != heads()
    assert heads() == SizeInt(4, WIDTH)
    assert width() > heads()
    assert heads() != "4"
    assert heads() is not None
    assert ears.comparisons == [(WIDTH, Const(32), True), (WIDTH, HEADS, False), (HEADS, WIDTH, True)]


def test_floats_are_leaks_until_they_are_rounded(ears: Ears) -> None:
    int(width() / heads())
    round(width() * 0.5)
    assert ears.leaks == []
    math.sqrt(heads())
    heads() ** -1
    assert ears.leaks == [HEADS, Op("**", (HEADS, Const(-1)))]


def test_what_int_drops_is_reported(ears: Ears) -> None:
    assert type(int(width() / heads())) is int
    assert ears.conversions == [(Op("int", (Op("/", (WIDTH, HEADS)),)), 8)]


def test_symbolic_integers_of_torch_are_met_as_plain_ints(ears: Ears) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    symbol = env.create_unbacked_symint()
    for result in (symbol * heads(), heads() * symbol, symbol + heads(), heads() - symbol, symbol // heads()):
        assert isinstance(result, torch.SymInt)
    assert ears.symbolics[0] == ("mul", 4, HEADS)


def test_a_counter_in_a_long_loop_becomes_plain() -> None:
    with observing(Ears()):
        total: int = heads()
        for _ in range(5000):
            total = total + heads()
    assert total == 4 * 5001


def test_neutral_operands_and_constants_fold() -> None:
    assert combine("+", HEADS, Const(0)) == HEADS
    assert combine("*", Const(1), HEADS) == HEADS
    assert combine("//", HEADS, Const(1)) == HEADS
    assert combine("*", Const(2), Const(3)) == Const(6)


def test_attributes_and_renaming_see_the_whole_expression() -> None:
    expr = Op("//", (Op("*", (HEADS, WIDTH)), Attr("attn", "config", ("groups",))))
    assert attributes(expr) == {HEADS, Attr("attn", "config", ("groups",))}
    assert renamed(expr, {"x": "y"}.get) == Op("//", (Op("*", (HEADS, ShapeOf("y", 2))), expr.operands[1]))
    assert renamed(expr, {}.get) is None


def test_describe_reads_like_code() -> None:
    config = Attr("layers.0", "config", ("sizes", 1))
    assert describe(Op("*", (Attr("", "num_heads"), WIDTH))) == "self.num_heads * x.shape[2]"
    assert describe(Op("//", (WIDTH, Op("*", (HEADS, Const(2)))))) == "x.shape[2] // (attn.heads * 2)"
    assert describe(Op("-", (WIDTH, Op("-", (HEADS, Const(2)))))) == "x.shape[2] - (attn.heads - 2)"
    assert describe(Op("max", (config, Op("neg", (HEADS,))))) == "max(layers.0.config.sizes[1], -attn.heads)"
