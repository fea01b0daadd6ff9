"""One network through both doors: the same axes; and what is cut from its file equals the zeroed original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

import depgraph
import importance
from tests.onnx_door.exporting import exported, exported_anew
from tests.zoo import MODULES, ZOO

SAME = """
    residual_cnn dense_net unet_transposed unet_interpolated channel_shuffle squeeze_excitation group_norm_cnn
    separable_conv1d pixel_shuffle multihead_attention transformer_encoder fused_qkv_unbind einsum_attention
    grouped_query_by_hand glu_chunk split_sizes bare_parameters patch_embedding tied_weights lstm_both_ways
    gru_encoder_decoder lstm_cell
"""
ANEW = """
    resnet_bottleneck mobilenet_v2 convnext vit segformer bert_masked_lm gpt2 llama_8_2 mamba bart
"""


def _axes(graph: Any, names: set[str]) -> dict[frozenset[tuple[str, int]], list[tuple[int, int, bool]]]:
    """Size, free groups and exactness of each axis, by the dims of the module's parameters that it reaches."""
    found: dict[frozenset[tuple[str, int]], list[tuple[int, int, bool]]] = {}
    for axis in graph.axes:
        members = {(m.target.partition("#")[0], m.dim) for m in axis.members}
        reached = frozenset((graph.capture.program.ties.get(n, n), d) for n, d in members if n in names)
        found.setdefault(reached, []).append((axis.size, int(axis.prunable.sum()), axis.exact))
    return {members: sorted(said) for members, said in found.items() if members}


@pytest.mark.parametrize("name", SAME.split())
def test_a_network_has_the_same_axes_through_both_doors(name: str, tmp_path: Path) -> None:
    example = MODULES[name]()
    names = {n for n, _ in example.model.named_parameters()}
    through_module = depgraph.trace(example.model, example.args, example.kwargs)
    through_file = depgraph.trace(exported(example, tmp_path / "model.onnx"), strict=True)
    assert _axes(through_file, names) == _axes(through_module, names)
    assert through_file.dense_cost.macs == through_module.dense_cost.macs
    _cut_equals_zeroed(through_file)


def _cut_equals_zeroed(graph: Any) -> None:
    plan = graph.plan(importance.Random(0), depgraph.Target(params=0.75))
    report = plan.apply_with_report()
    assert not report.check.vacuous
    assert report.check.exact_axes + report.check.mixed_axes == len(plan.removal)
    proto = ir.to_proto(report.model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ANEW.split())
def test_what_the_present_exporter_writes_is_cut(name: str, tmp_path: Path) -> None:
    example = ZOO[name]()
    through_module = depgraph.trace(example.model, example.args, example.kwargs)
    through_file = depgraph.trace(exported_anew(example, tmp_path / "model.onnx"), strict=True)
    sizes = [sorted((a.size, int(a.prunable.sum()), a.exact) for a in g.axes) for g in (through_file, through_module)]
    assert sizes[0] == sizes[1]
    assert through_file.dense_cost.macs == through_module.dense_cost.macs
    _cut_equals_zeroed(through_file)
