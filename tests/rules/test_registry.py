"""How rules are found, and how an axis equation is read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import depgraph
from depgraph import rules
from depgraph.graph import Program, Value
from depgraph.operators import is_pointwise
from depgraph.rules import Op, registry
from depgraph.rules.equation import parse
from tests.rules import samples_contract
from tests.rules.checking import Tried
from tests.rules.sample import Sample


def _op(*inputs: tuple[int, ...], out: tuple[int, ...]) -> Op:
    program = Program()
    values = [program.add(f"x{k}", "activation", shape) for k, shape in enumerate(inputs)]
    return Op("op", "my.op", {v.name: v for v in values}, [program.add("out", "activation", out)], program)


def _same(op: Op, a: Value, d: int, b: Value, e: int) -> bool:
    return op.relations.find(a.dim(d)) == op.relations.find(b.dim(e))


def test_overloads_and_in_place_forms_find_their_rule() -> None:
    table = rules.table()
    assert rules.lookup("aten.sum.dim_IntList") is table["aten.sum"]
    assert rules.lookup("aten.masked_fill_.Tensor") is table["aten.masked_fill"]
    assert rules.lookup("aten.repeat_interleave.Tensor") is not rules.lookup("aten.repeat_interleave.self_int")
    assert rules.lookup("aten.no_such_operator.default") is None


def test_an_operator_of_ones_own_gets_a_rule_by_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", {})
    rules.rule("my.op", equation="n i, o i -> n o", work="n o i")
    op = _op((2, 3), (5, 3), out=(2, 5))
    found = rules.lookup("my.op.default")
    assert found is not None
    found(op)
    x, w = op.inputs
    assert _same(op, x, 1, w, 1) and _same(op, w, 0, op.output, 1) and not _same(op, x, 0, op.output, 1)
    assert [(c.operand, c.dim) for c in op.relations.contractions] == [("x0", 1), ("x1", 1)]
    assert math.prod(op.relations.sizes[d] for d in op.relations.work[0].dims) == 30


def test_runs_broadcast_from_the_right() -> None:
    op = _op((1, 1, 4), (6, 1, 4), (3, 4), out=(6, 3, 4))
    op.relate("... c, ... c, ... c -> ... c")
    _, middle, last = op.inputs
    assert _same(op, middle, 0, op.output, 0)
    assert _same(op, last, 0, op.output, 1)
    assert all(_same(op, value, -1, op.output, -1) for value in op.inputs)


def test_marks_fix_and_mix() -> None:
    op = _op((2, 3, 4), out=(2, 3, 4))
    op.relate("n c~ h! -> n c h")
    assert [dim for dim, _, _ in op.relations.fixed] == [op.inputs[0].dim(2)]
    assert [dim for dim, _ in op.relations.mixed] == [op.inputs[0].dim(1)]


@pytest.mark.parametrize(("text", "complaint"), [("a b, b c", "no arrow"), ("a b -> (a", "can't read")])
def test_what_is_no_equation_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(text)


def test_a_term_must_fit_its_tensor() -> None:
    with pytest.raises(ValueError, match="doesn't fit"):
        _op((2, 3), out=(2,)).relate("a b c -> a")


@pytest.mark.parametrize("sample", samples_contract.SAMPLES, ids=str)
def test_multiply_accumulates_are_those_that_torch_counts(sample: Sample) -> None:
    tried = Tried(sample)
    with FlopCounterMode(display=False) as counter:
        tried.call(tried.tensors, {})
    counted = counter.get_total_flops() // 2
    if counted:  # torch counts matrix products, convolutions and attention only
        relations = tried.program.relations
        assert sum(math.prod(relations.sizes[d] for d in work.dims) for work in relations.work) == counted


def test_what_torch_computes_number_by_number_it_does_in_place_too() -> None:
    """`nn.Mish(inplace=True)`: torch doesn't mark all of them."""
    aten = torch.ops.aten
    for name in ("abs_", "mish_", "threshold_", "copysign_", "gelu_", "relu_"):
        operators = getattr(aten, name)
        assert all(is_pointwise(getattr(operators, overload)) for overload in operators.overloads()), name
    assert not any(map(is_pointwise, (aten.cumsum_.default, aten.softmax.int, aten.__and__.Scalar, len)))
    model = nn.Sequential(nn.Linear(6, 16), nn.Mish(inplace=True), nn.Linear(16, 4))
    assert not depgraph.trace(model, torch.randn(3, 6)).unknown
