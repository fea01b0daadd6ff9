"""Depth of files without modules' names: fused sums of a stream and a branch, and blocks told by what repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import depgraph
import importance
from depgraph.onnx_door.running import run_once
from tests.onnx_door.both import Doors
from tests.onnx_door.building import loaded, model, node, value, weights

X = np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32)
FORMS = [
    (kind, post) for kind in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization") for post in (False, True)
]


def _stack(kind: str, post: bool, layers: list[int]) -> ir.Model:
    """MLPs of a stream of 8 whose output bias, addition and norm are one operator; `layers` says which there are."""
    shapes: dict[str, Any] = {"e": (6, 8), "o": (8, 5), "g": (8,), "b": (8,)}
    simple = "Simplified" in kind
    norm = node(kind.removeprefix("Skip"), f"h g{'' if simple else ' b'}", "n", axis=-1)
    nodes = [node("MatMul", "x e", "h"), norm]
    for k in range(4):
        shapes |= {f"u{k}": (8, 12), f"d{k}": (12, 8), f"g{k}": (8,), f"b{k}": (8,), f"c{k}": (8,)}
    stream, normed = "h", "n"
    for k in layers:
        nodes += [
            node("MatMul", f"{normed} u{k}", f"i{k}"),
            node("Relu", f"i{k}", f"j{k}"),
            node("MatMul", f"j{k} d{k}", f"k{k}"),
        ]
        given = f"{normed if post else stream} k{k} g{k}{'' if simple else f' b{k}'} c{k}"
        made = f"n{k}" if post else f"n{k} - - s{k}"
        nodes.append(node(kind, given, made, domain="com.microsoft", epsilon=1e-5))
        stream, normed = f"s{k}", f"n{k}"
    nodes.append(node("MatMul", f"{normed} o", "y"))
    read = {name for one in nodes for name in one.input}
    held = [tensor for tensor in weights(**shapes) if tensor.name in read]
    return loaded(model(nodes, [value("x", [2, 6])], [value("y", [2, 5])], held))


def _given(made: ir.Model) -> np.ndarray:
    return run_once(made, {"x": X}, ["y"])[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_fused_sums_leaves_the_file_that_never_had_it(form: tuple[str, bool]) -> None:
    graph = depgraph.trace(_stack(*form, [0, 1, 2, 3]))
    assert [block.branches for block in graph.blocks] == [(branch.name,) for branch in graph.branches]
    names = [block.name for block in graph.blocks]
    assert len(names) == 4
    report = graph.cut_plan(branches=names[3:]).apply_with_report()
    if form[1]:
        np.testing.assert_allclose(_given(report.model), _given(_stack(*form, [0, 1, 2])), rtol=1e-4, atol=1e-5)
    again = depgraph.trace(report.model).dense_cost
    assert (again.params, again.macs) == (report.after.params, report.after.macs)
    assert not report.check.vacuous


@pytest.mark.parametrize("form", FORMS)
def test_the_branch_of_a_fused_sum_goes_with_its_bias_and_the_norm_stays(form: tuple[str, bool]) -> None:
    graph = depgraph.trace(_stack(*form, [0, 1]))
    report = graph.cut_plan(branches=[graph.branches[1].name]).apply_with_report()
    zeroed = _stack(*form, [0, 1])
    for name in ("d1", "c1"):
        held = zeroed.graph.initializers[name]
        held.const_value = ir.tensor(np.zeros_like(held.const_value.numpy()), name=name)
    np.testing.assert_allclose(_given(report.model), _given(zeroed), rtol=1e-4, atol=1e-5)
    assert not {"d1", "c1"} & set(report.model.graph.initializers)


def test_operators_that_stay_fused_are_as_they_were() -> None:
    graph = depgraph.trace(_stack(*FORMS[1], [0, 1]))
    cut = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8)).apply()
    fused = [[o.name for o in one.outputs] for one in cut.graph if one.op_type == FORMS[1][0]]
    assert fused == [["n0"], ["n1"]]


def test_blocks_are_told_by_what_repeats_where_names_tell_nothing(doors: Doors) -> None:
    proto = onnx.load(doors.path)
    named = {tensor.name: f"w{k}" for k, tensor in enumerate(proto.graph.initializer)}
    for tensor in proto.graph.initializer:
        tensor.name = named[tensor.name]
    for k, one in enumerate(proto.graph.node):
        one.name = f"operator{k}"
        one.input[:] = [named.get(name, name) for name in one.input]
    graph = depgraph.trace(loaded(proto))
    assert [(b.macs, b.params) for b in graph.blocks] == [(b.macs, b.params) for b in doors.file.blocks]
    cut = graph.cut_plan(branches=[graph.blocks[0].name]).apply()
    expected = doors.file.cut_plan(branches=[doors.file.blocks[0].name]).apply()
    np.testing.assert_array_equal(doors.run(cut, doors.batches[1]), doors.run(expected, doors.batches[1]))
