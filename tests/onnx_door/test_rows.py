"""Every row of the table under a name of ONNX, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import depgraph
from depgraph import rules
from depgraph.classes import NONE
from tests.onnx_door.rows import ROWS, Row

UNTRIED = """
onnx.StringNormalizer onnx.TfIdfVectorizer microsoft.BiasAdd microsoft.SimplifiedLayerNormalization
"""
"""Of strings, or what ONNX Runtime has no code for on a CPU."""


def _traced(row: Row) -> Any:
    return depgraph.trace(row.model(), strict=True, free=[f"output {k}" for k in range(row.outputs - len(row.without))])


def _said(graph: Any, row: Row) -> tuple[set[str], set[str]]:
    """The dims of data operands that no group may go from, and those that an operator mixes."""
    fixed, mixed = set(), set()
    for name in graph.capture.lowered.held:
        value = graph.capture.program.values[name]
        for d, size in enumerate(value.shape if value.kind == "parameter" else ()):
            number = graph.widths.class_of(value.dim(d))
            axes = [graph[a] for a in graph.widths.axes_of(value.dim(d))]
            axes = [a for a in axes if (n := a.labels[number][a.labels[number] != NONE]).size and a.prunable[n].any()]
            if size > 1 and not axes:
                fixed.add(f"{name[1:]}.{d}")
            elif not all(axis.exact for axis in axes):
                mixed.add(f"{name[1:]}.{d}")
    return fixed, mixed


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_rule_says_what_its_operator_does(row: Row) -> None:
    graph = _traced(row)
    fixed, mixed = _said(graph, row)
    if row.fixed != "*":
        assert (fixed, mixed) == (set(row.fixed.split()), set(row.mixed.split()))
    together = {}
    for axis in graph.axes:
        free = np.flatnonzero(axis.prunable)
        free = free[: axis.size - graph.widths.least(axis.name)]
        if len(free):
            graph.cut_plan({axis.name: free[len(free) // 2 :: 2]}).apply()
            together[axis.name] = free[:1]
    graph.cut_plan(together).apply()


def test_every_row_of_the_table_is_tried() -> None:
    named = {name for name in rules.table() if name.startswith(("onnx.", "microsoft."))}
    assert named - {row.name for row in ROWS} == set(UNTRIED.split())
