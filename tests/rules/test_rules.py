"""Every row of the table of rules against the operator it describes."""

from __future__ import annotations

from typing import Any

import pytest

from depgraph import rules
from tests.rules import (
    samples_backward,
    samples_contract,
    samples_elementwise,
    samples_index,
    samples_left_alone,
    samples_matrix,
    samples_move,
    samples_norm,
    samples_recurrent,
    samples_reduce,
    samples_space,
    samples_torchvision,
)
from tests.rules.checking import Tried, check, said
from tests.rules.sample import Sample

_MODULES = (
    samples_backward,
    samples_contract,
    samples_elementwise,
    samples_index,
    samples_left_alone,
    samples_matrix,
    samples_move,
    samples_norm,
    samples_recurrent,
    samples_reduce,
    samples_space,
    samples_torchvision,
)
SAMPLES: list[Sample] = [one for module in _MODULES for one in module.SAMPLES]
UNSAMPLED: dict[str, str] = {row: why for module in _MODULES for row, why in getattr(module, "UNSAMPLED", {}).items()}


def _marked(sample: Sample) -> Any:
    marks = [pytest.mark.xfail(reason=sample.gap, raises=AssertionError)] if sample.gap else []
    return pytest.param(sample, id=str(sample), marks=marks)


@pytest.mark.parametrize("sample", [_marked(one) for one in SAMPLES])
def test_a_rule_says_what_its_operator_does(sample: Sample) -> None:
    tried = Tried(sample)
    assert said(tried) == (sample.fixed, sample.mixed, sample.tied)
    check(tried)


def test_every_row_of_the_table_has_a_sample() -> None:
    table = rules.table()
    tried = set()
    for sample in SAMPLES:
        target = str(sample.operator)
        tried.add(target if target in table else target.rsplit(".", 1)[0])
    onnx = {name for name in table if name.startswith(("onnx.", "microsoft."))}  # see tests/onnx_door/test_rows.py
    missing = sorted(table.keys() - onnx - tried - UNSAMPLED.keys())
    assert not missing, f"rows without a sample: {missing}"
    assert not sorted(UNSAMPLED.keys() & tried), "listed as without a sample, but has one"
    assert UNSAMPLED.keys() <= table.keys()
