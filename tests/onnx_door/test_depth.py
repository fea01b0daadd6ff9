"""Blocks and branches of files: found, left out, checked, scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import depgraph
import importance
from depgraph.errors import CutError, PlanError, ScoreError
from tests.onnx_door.both import Doors
from tests.onnx_door.building import loaded, mlp, model, node, value, weights

depth = importance.depth


def test_branches_and_blocks_are_those_of_the_module(doors: Doors) -> None:
    for kind in ("branches", "blocks"):
        module, file = (getattr(graph, kind) for graph in (doors.module, doors.file))
        assert [(b.name, b.macs) for b in file] == [(b.name, b.macs) for b in module]
    assert [b.kind for b in doors.file.branches] == ["attention", "mlp"] * 2


@pytest.mark.parametrize(
    "names", [["layers.0:attention"], ["layers.1:mlp"], ["layers.0"], ["layers.1", "layers.0:mlp"]]
)
def test_what_is_left_computes_what_the_shorter_module_does(doors: Doors, names: list[str]) -> None:
    report = doors.file.cut_plan(branches=names).apply_with_report()
    proto = ir.to_proto(report.model)
    onnx.checker.check_model(proto, full_check=True)
    assert not report.check.vacuous and report.check.branches == len(names)
    assert depgraph.trace(report.model).dense_cost.macs == report.after.macs < report.before.macs
    gone = [name for name in names if name.startswith("layers.1")]
    assert not any(t.name.startswith("layers.1.") for t in proto.graph.initializer) or gone != ["layers.1"]
    shorter = doors.module.cut_plan(branches=names).apply()
    with torch.no_grad():
        expected = shorter(doors.batches[1])
    torch.testing.assert_close(doors.run(report.model, doors.batches[1]), expected, rtol=1e-4, atol=1e-5)


def test_widths_and_depth_go_together(doors: Doors) -> None:
    plan = doors.file.plan(importance.Magnitude(), depgraph.Target(macs=0.7)).with_branches("layers.1:mlp")
    report = plan.apply_with_report()
    assert report.check.exact_axes and report.check.branches == 1 and not report.check.vacuous
    cost = depgraph.trace(report.model).dense_cost
    assert (cost.params, cost.macs) == (report.after.params, report.after.macs)


def test_a_stream_that_is_an_output_keeps_its_name() -> None:
    nodes = [
        node("MatMul", "x w", "h"), node("MatMul", "h a", "i"), node("Relu", "i", "j"), node("MatMul", "j b", "k"), node("Add", "h k", "y"),
    ]  # fmt: skip
    made = model(nodes, [value("x", [2, 6])], [value("y", [2, 8])], weights(w=(6, 8), a=(8, 12), b=(12, 8)))
    graph = depgraph.trace(loaded(made))
    (branch,) = graph.branches
    report = graph.cut_plan(branches=[branch.name]).apply_with_report()
    proto = ir.to_proto(report.model)
    assert [o.name for o in proto.graph.output] == ["y"] and [t.name for t in proto.graph.initializer] == ["w"]
    assert [n.op_type for n in proto.graph.node] == ["MatMul", "Identity"]


def test_a_file_is_not_cut_in_place(doors: Doors) -> None:
    plan = doors.file.cut_plan(branches=[doors.file.branches[0].name])
    with pytest.raises(CutError, match="can't be cut in place: use plan.apply"):
        plan.apply_()


def test_what_is_no_branch_is_refused(doors: Doors) -> None:
    with pytest.raises(PlanError, match="'layers.9' is no branch or block"):
        doors.file.cut_plan(branches=["layers.9"])
    with pytest.raises(ScoreError, match="has no blocks that could be left out"):
        depth.DepthMagnitude()(depgraph.trace(loaded(mlp())))


SCORES = {
    "influence": depth.BlockInfluence,
    "shift": depth.OutputShift,
    "without": depth.Without,
    "angular": depth.AngularSpan,
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_the_module(doors: Doors, name: str) -> None:
    scorer: Any = SCORES[name](doors.batches)
    module, file = scorer(doors.module), scorer(doors.file)
    assert module.keys() == file.keys()
    np.testing.assert_allclose([file[k] for k in module], list(module.values()), rtol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda b: depth.PairSearch(b, "branches"),
        lambda b: depth.Sleb(b, first=0, last=0),
        lambda b: depth.FinerCut(b),
        lambda b: depth.AngularDrop(b),
    ],
)
def test_searches_find_what_they_find_in_the_module(doors: Doors, make: Any) -> None:
    module, file = (make(doors.batches)(graph, 1) for graph in (doors.module, doors.file))
    assert module.names == file.names and module.value == pytest.approx(file.value, rel=1e-3)


def test_merging_needs_modules(doors: Doors) -> None:
    with pytest.raises(ScoreError, match="Laco needs the modules of its blocks"):
        depth.Laco(doors.batches)(doors.file)
