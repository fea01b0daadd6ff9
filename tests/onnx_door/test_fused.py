"""Files that ONNX Runtime's optimiser of transformers has fused come apart as they did before."""

from __future__ import annotations

import logging
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
