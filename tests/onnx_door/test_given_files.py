"""Files that others made: the topologies of the onnx package, and a folder that an environment variable names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import depgraph
import importance
from depgraph.errors import NothingToPrune

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
TOPOLOGIES = "bvlc_alexnet densenet121 inception_v1 inception_v2 resnet50 shufflenet squeezenet vgg19 zfnet512"
SMALL = {"squeezenet", "shufflenet"}
GIVEN = sorted(Path(os.environ.get("DEPGRAPH_ONNX_FILES", "nowhere")).glob("*.onnx"))


def _with_numbers(model: ir.Model) -> ir.Model:
    """The file with random weights, where it makes up constant ones by ConstantOfShape from a shape that it holds."""
    generator = np.random.default_rng(1)
    graph = model.graph
    for node in list(graph):
        held = node.inputs[0].const_value if node.op_type == "ConstantOfShape" and node.inputs[0] is not None else None
        if held is None:
            continue
        shape = held.numpy().tolist()
        fan_in = max(int(np.prod(shape[1:])), 1)
        array = (
            generator.standard_normal(shape) / np.sqrt(fan_in) if len(shape) > 1 else generator.uniform(0.5, 1.5, shape)
        )
        name = f"{node.outputs[0].name}_drawn"
        tensor = ir.tensor(array.astype(np.float32), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        graph.inputs.append(value)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SMALL else [pytest.mark.slow]) for n in TOPOLOGIES.split()]
)
def test_a_topology_of_the_onnx_package_loses_its_macs(name: str) -> None:
    path = LIGHT / f"light_{name}.onnx"
    if not path.is_file():
        pytest.skip("the onnx package was installed without its test data")
    graph = depgraph.trace(_with_numbers(ir.load(path)))
    report = graph.plan(importance.Magnitude(), depgraph.Target(macs=0.6)).apply_with_report()
    assert report.after.macs <= 0.6 * report.before.macs
    assert not report.check.vacuous


@pytest.mark.slow
@pytest.mark.parametrize("path", GIVEN, ids=lambda path: path.name)
def test_a_given_file_loses_its_macs_or_says_what_stands_in_the_way(path: Path, tmp_path: Path) -> None:
    graph = depgraph.trace(path)
    try:
        plan = graph.plan(importance.Magnitude(), depgraph.Target(macs=0.7))
    except NothingToPrune as error:
        assert "fixed" in str(error)
        return
    report = plan.apply_with_report()
    assert not report.check.vacuous
    depgraph.save(report.model, tmp_path / "small.onnx")
    onnx.checker.check_model(tmp_path / "small.onnx", full_check=True)
    assert depgraph.trace(tmp_path / "small.onnx").dense_cost.macs <= 0.7 * graph.dense_cost.macs
