"""What tries the rules finds the wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from depgraph import rules
from depgraph.rules import Op
from tests.rules.checking import Tried, check
from tests.rules.sample import Sample, sample, t

_table = rules.table()


def _nothing(op: Op) -> None:
    """Says nothing."""


def _elementwise(op: Op) -> None:
    op.align_elementwise([*op.inputs, op.output])


def _mixed_elementwise(op: Op) -> None:
    _elementwise(op)
    op.relations.mix(op.output.dim(-1), "it does")


def _linear_without_sum(op: Op) -> None:
    _table["aten.linear"](op)
    op.relations.contractions.clear()


def _mean_as_sum(op: Op) -> None:
    _table["aten.sum"](op)


def _interleave_as_repeat(op: Op) -> None:
    along = op["dim"]
    op.align_beside(op["self"], op.output, along)
    op.relations.fold(op.output.dim(along), [op.relations.new_dim(op["repeats"]), op["self"].dim(along)])


def _shuffle_as_identity(op: Op) -> None:
    op.align_elementwise([op.inputs[0], op.output])


def _group_norm_of_all(op: Op) -> None:
    op.relate("n c ..., c, c -> n c ...")
    op.relations.mix(op.output.dim(1), "it averages over all channels")


def _grouped_as_plain(op: Op) -> None:
    op.relate("n i h! w!, o j k! l!, o -> n o y! x!", op["input"], op["weight"], op["bias"])


def _cat_at_the_wrong_place(op: Op) -> None:
    op.arguments["tensors"] = op["tensors"][::-1]
    _table["aten.cat"](op)


WRONG: list[tuple[Sample, Callable[[Op], None]]] = [
    (sample("add.Tensor", t(3, 4), t(3, 4)), _nothing),
    (sample("linear", t(3, 4), t(5, 4), t(5)), _linear_without_sum),
    (sample("cumsum", t(3, 4), 1), _elementwise),
    (sample("logcumsumexp", t(3, 4), 1), _mixed_elementwise),
    (sample("softmax.int", t(3, 4), 1), _elementwise),
    (sample("flip", t(3, 4), [1]), _elementwise),
    (sample("roll", t(3, 4), [1], [1]), _elementwise),
    (sample("t", t(3, 3)), _elementwise),
    (sample("mean.dim", t(3, 4), [1]), _mean_as_sum),
    (sample("amax", t(3, 4), [1]), _mean_as_sum),
    (sample("repeat_interleave.self_int", t(3, 4), 2, 1), _interleave_as_repeat),
    (sample("channel_shuffle", t(2, 6, 2), 3), _shuffle_as_identity),
    (sample("group_norm", t(2, 6, 2), 3, t(6), t(6)), _group_norm_of_all),
    (sample("conv2d", t(2, 4, 3, 3), t(4, 2, 3, 3), t(4), [1, 1], [1, 1], [1, 1], 2), _grouped_as_plain),
    (sample("cat", [t(3, 2), t(3, 4)], 1), _cat_at_the_wrong_place),
]


@pytest.mark.parametrize(("sample", "wrong"), WRONG, ids=lambda x: x.__name__.strip("_") if callable(x) else str(x))
def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch, sample: Sample, wrong: Callable[[Op], None]) -> None:
    monkeypatch.setattr(rules, "lookup", lambda target: wrong)
    tried = Tried(sample)
    with pytest.raises(AssertionError):
        check(tried)
