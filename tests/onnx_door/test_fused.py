"""Files that ONNX Runtime's optimiser of transformers has fused come apart as they did before."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.transformers.optimizer import optimize_model

import depgraph
import importance
from tests.onnx_door.building import loaded, model, node, value, weights, whole
from tests.onnx_door.exporting import exported
from tests.zoo import ZOO

FUSED = {
    "distilbert": ("bert", {"EmbedLayerNormalization", "SkipLayerNormalization", "BiasGelu"}),
    "gpt2": ("gpt2", {"SkipLayerNormalization", "FastGelu"}),
}
"""What is exported, as what it is fused, and what it has then that no ONNX operator set has."""


@pytest.fixture(scope="module", params=FUSED)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file, as it was exported and fused."""
    name, (kind, operators) = request.param, FUSED[request.param]
    folder = tmp_path_factory.mktemp(name)
    example = ZOO[name]()
    example.model.set_attn_implementation("eager")
    plain = exported(example, folder / "plain.onnx", opset_version=14, do_constant_folding=True)
    logging.disable(logging.CRITICAL)
    try:
        optimize_model(str(plain), kind, opt_level=0).save_model_to_file(str(folder / "fused.onnx"))
    finally:
        logging.disable(logging.NOTSET)
    found = {node.op_type for node in onnx.load(folder / "fused.onnx").graph.node if node.domain == "com.microsoft"}
    assert found == operators
    return depgraph.trace(plain), depgraph.trace(folder / "fused.onnx")


def _free(graph: Any) -> list[int]:
    return sorted(axis.size for axis in graph.axes if axis.prunable.any())


def test_a_fused_file_has_the_axes_branches_and_blocks_of_the_plain_one(both: Any) -> None:
    plain, fused = both
    assert not fused.capture.program.unknown
    assert _free(fused) == _free(plain)
    for kind in ("branches", "blocks"):
        assert [b.macs for b in getattr(fused, kind)] == [b.macs for b in getattr(plain, kind)] != []


def test_a_fused_file_is_cut_in_width_and_depth(both: Any) -> None:
    _, fused = both
    plan = fused.plan(importance.Magnitude(), depgraph.Target(macs=0.7))
    assert not plan.apply_with_report().check.vacuous
    for part in (fused.branches[0], fused.blocks[-1]):
        check = fused.cut_plan(branches=[part.name]).apply_with_report().check
        assert not check.vacuous and check.error < 1e-5


@pytest.mark.parametrize("given", [True, False], ids=["lengths of a mask", "lengths in the file"])
def test_grouped_heads_whose_queries_keys_and_values_lie_in_one_tensor_go_together(given: bool) -> None:
    """Two groups of two heads of queries, one of keys and one of values each, all of eight numbers."""
    nodes = [
        node("LayerNormalization", "x g", "n"),
        node("MatMul", "n qkv", "p"),
        node("GroupQueryAttention", "p - - - - lengths total", "a k v", domain="com.microsoft", num_heads=4, kv_num_heads=2),
        node("MatMul", "a o", "b"),
        node("Add", "x b", "r"),
        node("LayerNormalization", "r g", "m"),
        node("MatMul", "m head", "y"),
    ]  # fmt: skip
    held = [*weights(g=(32,), qkv=(32, 64), o=(32, 32), head=(32, 5)), whole("lengths", 2, 2), whole("total", 3)]
    held[-2:] = [numpy_helper.from_array(numpy_helper.to_array(t).astype(np.int32), t.name) for t in held[-2:]]
    inputs = [value("x", [2, 3, 32])]
    if given:
        held[-2:] = [whole("along", 1), numpy_helper.from_array(np.array(1, np.int32), "one")]
        counted = [node("ReduceSum", "mask along", "count", keepdims=0), node("Sub", "count one", "lengths"),
                   node("ReduceMax", "count", "total", keepdims=0)]  # fmt: skip
        nodes, inputs = [*counted, *nodes], [*inputs, value("mask", [2, 3], TensorProto.INT32)]
    graph = depgraph.trace(loaded(model(nodes, inputs, [value("y", [2, 3, 5])], held)))
    assert [branch.kind for branch in graph.branches] == ["attention"]
    (heads,) = (axis for axis in graph.axes if axis.size == 2 and axis.prunable.any())
    report = graph.cut_plan({heads.name: [0]}).apply_with_report()
    assert not report.check.vacuous
    shapes = {name: list(v.shape) for name, v in report.model.graph.initializers.items()}
    assert (shapes["qkv"], shapes["o"]) == ([32, 32], [16, 32])
    check = graph.cut_plan(branches=[graph.branches[0].name]).apply_with_report().check
    assert not check.vacuous and check.branches == 1
