"""Files of fewer bits compute nearly what the float file does, or aren't written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from depgraph.errors import ExportError
from exporters import QuantOptions, quantise, to_onnx, to_ort
from exporters.feeds import random_feeds

IMAGE = (4, 3, 12, 12)


class Both(nn.Module):
    """Convolutions with norms, then matrices with rows of 40."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 40, 3))
        self.matrices = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 7))
        self.depgraph_record = {"pruned": "this"}

    def forward(self, x: Tensor) -> Tensor:
        return self.matrices(self.convolutions(x).flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Both().eval()
        nn.init.uniform_(model.convolutions[1].running_var, 0.5, 2)
        path = tmp_path_factory.mktemp("float") / "model.onnx"
        to_onnx(model, torch.randn(IMAGE), path)
    return path


def batches() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(1)
    yield from (generator.standard_normal(IMAGE).astype(np.float32) for _ in range(3))


def outputs(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def save_identity(path: Path) -> None:
    """A file that gives one of its inputs back, whose sizes are those of a decoder's."""
    helper = onnx.helper
    shapes = {"mask": ["b", "past + new"], "past": ["b", 3, "past"], "new": ["b", "new"]}
    kinds = {"mask": 7, "past": 1, "new": 7}
    inputs = [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]
    nodes = [helper.make_node("Identity", ["past"], ["y"])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, None)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.mark.parametrize(
    ("kind", "error", "operators"),
    [
        ("float16", 0.002, {}),
        ("int8-dynamic", 0.03, {"MatMul": 2}),
        ("int8-static", 0.03, {"Conv": 2, "MatMul": 2}),
        ("int4", 0.2, {"MatMul": 2}),
    ],
)
def test_the_error_is_what_it_says_and_small(
    kind: Any, error: float, operators: dict[str, int], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    report = quantise(source, out, batches(), options=QuantOptions(kind))
    pairs = [(outputs(source, x), outputs(out, x)) for x in batches()]
    apart = np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs))
    assert report.distance.error == pytest.approx(apart, rel=1e-3) and 0 < apart < error
    assert operators.items() <= report.operators.items() and report.batches == 3
    assert report.bytes == out.stat().st_size and report.bytes_before == source.stat().st_size
    assert str(report).startswith(f"Wrote {out} ({kind}, ")
    props = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    assert props["depgraph.quantised"] == kind and json.loads(props["depgraph.pruned"]) == {"pruned": "this"}
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]


def test_static_activations_are_unsigned_and_norms_are_folded(source: Path, tmp_path: Path) -> None:
    quantise(source, tmp_path / "s.onnx", batches(), options=QuantOptions("int8-static"))
    graph = onnx.load(tmp_path / "s.onnx").graph
    zero_points = {t.name: t.data_type for t in graph.initializer}
    kinds = {zero_points[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert kinds == {onnx.TensorProto.UINT8}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


def test_what_is_excluded_stays_and_rows_without_whole_blocks_are_named(source: Path, tmp_path: Path) -> None:
    matrices = [node.name for node in onnx.load(source).graph.node if node.op_type == "MatMul"]
    options = QuantOptions("int4", exclude=(matrices[1],))
    report = quantise(source, tmp_path / "s.onnx", batches(), options=options)
    assert report.operators == {"MatMul": 1}
    assert any("rows of 40 are padded to blocks of 32: pruning with round_to=32 spares that" in n for n in report.notes)


def test_an_error_beyond_the_tolerance_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    (tmp_path / "s.onnx").write_text("before")
    with pytest.raises(ExportError, match=r"an error of 0\.\d+ at output 'output', where 0\.001 is allowed"):
        quantise(source, tmp_path / "s.onnx", batches(), options=QuantOptions("int4", tolerance=0.001))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("s.onnx", "before")]


def test_a_file_does_not_take_the_place_of_what_it_is_made_of(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(ExportError, match="would take the place of the float file"):
        quantise(source, source, options=QuantOptions("int8-dynamic"))
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        (QuantOptions("int8-static"), None, "calibrated on real inputs: give `data`"),
        (QuantOptions("int4", block_size=24), None, "powers of two from 16 to 256"),
        (QuantOptions("int4", block_size=8), None, "powers of two from 16 to 256"),
        (QuantOptions("int3"), None, "none of float16, int8-dynamic"),  # type: ignore[arg-type]
        (QuantOptions("int8-static"), [], "holds no batch"),
        (QuantOptions("int8-dynamic"), 5, "`data` is a int; give a list of batches"),
        (QuantOptions("int8-dynamic"), [{"x": "abc"}], "gives <U3 as 'x', where the file wants tensor"),
        (QuantOptions("int8-dynamic"), [{"y": np.ones(IMAGE)}], "its inputs are x; missing x; unknown y"),
        (QuantOptions("int8-dynamic"), [(np.ones(IMAGE), np.ones(3))], "its inputs are x"),
        (QuantOptions("int8-dynamic"), [np.ones((2, 5, 9, 9))], "fails to run the original on the data"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Any, data: Any, says: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=says):
        quantise(source, tmp_path / "s.onnx", data, options=options)
    assert not list(tmp_path.iterdir())


def test_what_is_quantised_or_has_nothing_to_quantise_is_refused(source: Path, tmp_path: Path) -> None:
    once = tmp_path / "once.onnx"
    quantise(source, once, options=QuantOptions("int8-dynamic"))
    with pytest.raises(ExportError, match="is quantised already"):
        quantise(once, tmp_path / "twice.onnx", options=QuantOptions("int4"))
    save_identity(tmp_path / "same.onnx")
    with pytest.raises(ExportError, match="holds nothing that int4 quantises"):
        quantise(tmp_path / "same.onnx", tmp_path / "c.onnx", options=QuantOptions("int4"))
    with pytest.raises(ExportError, match="There is no file"):
        quantise(tmp_path / "none.onnx", tmp_path / "c.onnx", options=QuantOptions("int4"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once.onnx", "same.onnx"]


def test_ort_files_compute_the_same(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.ort"
    report = to_ort(source, out)
    x = next(batches())
    assert np.allclose(outputs(out, x), outputs(source, x), atol=1e-5) and report.distance.error < 1e-5
    assert report.bytes == out.stat().st_size and onnxruntime.__version__ in str(report)
    assert out.read_bytes()[4:8] == b"ORTM"
    with pytest.raises(ExportError, match="must end in .ort"):
        to_ort(source, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="There is no file"):
        to_ort(tmp_path / "none.onnx", tmp_path / "n.ort")
    assert [p.name for p in tmp_path.iterdir()] == ["m.ort"]


def test_random_inputs_follow_sizes_that_are_sums(tmp_path: Path) -> None:
    save_identity(tmp_path / "m.onnx")
    feeds = random_feeds(onnxruntime.InferenceSession(str(tmp_path / "m.onnx")))
    assert {name: array.shape for name, array in feeds.items()} == {"mask": (2, 4), "past": (2, 3, 2), "new": (2, 2)}
    assert feeds["mask"].all() and set(feeds["new"].flat) <= {0, 1}
