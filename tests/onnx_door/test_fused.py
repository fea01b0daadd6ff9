"""Files that ONNX Runtime's optimiser of transformers has fused come apart as they did before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnxruntime.transformers.optimizer import optimize_model

import depgraph
import importance
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
    for whole in (fused.branches[0], fused.blocks[-1]):
        check = fused.cut_plan(branches=[whole.name]).apply_with_report().check
        assert not check.vacuous and check.error < 1e-5


def test_a_file_whose_shapes_the_runtime_sees_otherwise_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """A flag that is neither 0 nor 1 is a yes to onnx's inference and a no to ONNX Runtime."""
    from depgraph.errors import CheckError
    from tests.onnx_door.building import model, node, value, weights

    nodes = [node("MatMul", "x a", "h"), node("ReduceL2", "h", "y", axes=[0], keepdims=2)]
    proto = model(nodes, [value("x", [3, 4])], [value("y", ["r", 6])], weights(a=(4, 6)), opset=13)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "model.onnx")
    graph = depgraph.trace(tmp_path / "model.onnx", free=["output 0"])
    with pytest.raises(
        CheckError, match=r"'y' is of shape \(6,\) in ONNX Runtime, where onnx's inference says \(1, 6\)"
    ):
        graph.cut_plan({axis.name: [0] for axis in graph.axes if axis.size == 6}).apply()
