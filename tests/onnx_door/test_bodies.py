"""Weights and operators inside the bodies of If, Loop and Scan, and in functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

import depgraph
from tests.onnx_door.building import loaded, model, node, value, weights


def _without(proto: onnx.ModelProto, size: int, groups: list[int], args: Any = ()) -> ir.Model:
    """The checked model without some groups of its only free axis of that size."""
    graph = depgraph.trace(loaded(proto), args, strict=True)
    (axis,) = [a for a in graph.axes if a.size == size and a.prunable.all()]
    report = graph.cut_plan({axis.name: groups}).apply_with_report()
    assert not report.check.vacuous
    onnx.checker.check_model(ir.to_proto(report.model), full_check=True)
    return report.model


def _shapes(made: ir.Model) -> dict[str, list[int]]:
    return {str(v.name): list(v.shape) for g in made.graphs() for v in g.initializers.values()}  # type: ignore[arg-type]


def test_both_branches_are_cut_with_what_is_around_them() -> None:
    """h = x W; if the flag: r = relu(h V) else r = h U; y = r Z."""
    one = helper.make_graph(
        [node("MatMul", "h v", "a"), node("Relu", "a", "b")], "one", [], [value("b", [2, 8])], weights(v=(16, 8))
    )
    other = helper.make_graph([node("MatMul", "h u", "c")], "other", [], [value("c", [2, 8])], weights(u=(16, 8)))
    nodes = [
        node("MatMul", "x w", "h"),
        node("If", "flag", "r", then_branch=one, else_branch=other),
        node("MatMul", "r z", "y"),
    ]
    inputs = [value("x", [2, 6]), value("flag", [], TensorProto.BOOL)]
    proto = model(nodes, inputs, [value("y", [2, 3])], weights(w=(6, 16), z=(8, 3)))
    for flag in (True, False):
        given = {"x": np.ones((2, 6), np.float32), "flag": np.array(flag)}
        assert _shapes(_without(proto, 16, [0, 5], given)) == {"w": [6, 14], "z": [8, 3], "v": [14, 8], "u": [14, 8]}
        assert _shapes(_without(proto, 8, [7], given)) == {"w": [6, 16], "z": [7, 3], "v": [16, 7], "u": [16, 7]}


def test_a_loop_carries_its_state_through_the_body() -> None:
    """h = x W; three times h = tanh(h R); y = h V."""
    body = helper.make_graph(
        [node("MatMul", "s r", "a"), node("Tanh", "a", "t"), node("Identity", "go", "on")],
        "body",
        [value("k", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("s", [2, 8])],
        [value("on", [], TensorProto.BOOL), value("t", [2, 8])],
    )
    nodes = [node("MatMul", "x w", "h"), node("Loop", "three yes h", "o", body=body), node("MatMul", "o v", "y")]
    numbers = [numpy_helper.from_array(np.array(3), "three"), numpy_helper.from_array(np.array(True), "yes")]
    proto = model(nodes, [value("x", [2, 6])], [value("y", [2, 3])], [*weights(w=(6, 8), r=(8, 8), v=(8, 3)), *numbers])
    assert _shapes(_without(proto, 8, [1, 2]))["r"] == [6, 6]


def test_a_scan_steps_along_its_input() -> None:
    """Over the steps of x: s = tanh(s R + x W); all s, times V."""
    body = helper.make_graph(
        [node("MatMul", "s r", "a"), node("MatMul", "x1 w", "b"), node("Add", "a b", "c"), node("Tanh", "c", "t"),
         node("Identity", "t", "each")],
        "body", [value("s", [2, 8]), value("x1", [2, 6])], [value("t", [2, 8]), value("each", [2, 8])],
    )  # fmt: skip
    nodes = [node("Scan", "zero x", "last all", body=body, num_scan_inputs=1), node("MatMul", "all v", "y")]
    zero = numpy_helper.from_array(np.full((2, 8), 0.5, np.float32), "zero")
    proto = model(
        nodes, [value("x", [5, 2, 6])], [value("y", [5, 2, 3])], [*weights(w=(6, 8), r=(8, 8), v=(8, 3)), zero]
    )
    shapes = _shapes(_without(proto, 8, [1, 2]))
    assert (shapes["r"], shapes["w"], shapes["v"], shapes["zero"]) == ([6, 6], [6, 6], [6, 3], [2, 6])


def test_a_function_is_written_out_where_it_is_called() -> None:
    twice = helper.make_function(
        "my.own",
        "Layer",
        ["a", "m"],
        ["z"],
        [node("MatMul", "a m", "p"), node("Relu", "p", "z")],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        node("Layer", "x w", "h", domain="my.own"),
        node("Layer", "h v", "k", domain="my.own"),
        node("MatMul", "k u", "y"),
    ]
    proto = model(
        nodes, [value("x", [2, 6])], [value("y", [2, 3])], weights(w=(6, 16), v=(16, 8), u=(8, 3)), functions=[twice]
    )
    assert _shapes(_without(proto, 16, [3])) == {"w": [6, 15], "v": [15, 8], "u": [8, 3]}


def test_what_a_branch_not_taken_needs_stays() -> None:
    """The other branch is made for another width, so that it can't be gone through."""
    one = helper.make_graph([node("Identity", "h", "b")], "one", [], [value("b", [2, 16])])
    other = helper.make_graph([node("MatMul", "h odd", "c")], "other", [], [value("c", [2, 16])], weights(odd=(12, 16)))
    nodes = [
        node("MatMul", "x w", "h"),
        node("If", "flag", "r", then_branch=one, else_branch=other),
        node("MatMul", "r z", "y"),
    ]
    flag = numpy_helper.from_array(np.array(True), "flag")
    proto = model(nodes, [value("x", [2, 6])], [value("y", [2, 3])], [*weights(w=(6, 16), z=(16, 3)), flag])
    graph = depgraph.trace(loaded(proto))
    assert not any(axis.prunable.any() for axis in graph.axes)
    assert "1 branches" in graph.note
