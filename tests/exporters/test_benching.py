"""ONNX files side by side: what they are run on, what is said of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from depgraph import cli
from depgraph.errors import ExportError, ModelError
from exporters.benching import Running, bench
from exporters.latency import Latency, interleaved
from exporters.onnx_check import open_session
from exporters.onnx_file import RECORD_KEY
from exporters.workloads import Sizes, workloads

HEADS, WIDTH, WORDS = 2, 4, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a file each, dense and pruned."""
    root = tmp_path_factory.mktemp("files")
    for name, hidden in (("dense", 640), ("pruned", 16)):
        (root / name).mkdir()
        perceptron(root / name / "model.onnx", hidden)
    return root


def perceptron(path: Path, hidden: int, record: dict[str, object] | None = None) -> Path:
    """Two products in a row, with an open batch, and steps that are open too."""
    shapes = {"a": (6, hidden), "b": (hidden, 3)}
    held = {name: ir.tensor(np.ones(shape, np.float32), name=name) for name, shape in shapes.items()}
    a, b = (ir.Value(name=name, shape=ir.Shape(shapes[name]), const_value=tensor) for name, tensor in held.items())
    x = _value("x", ir.DataType.FLOAT, ["batch", "steps", 6])
    first = ir.node("MatMul", [x, a])
    last = ir.node("MatMul", [first.outputs[0], b])
    out = last.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "steps", 3])
    graph = ir.Graph([x], [out], nodes=[first, last], initializers=[a, b], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    if record is not None:
        model.metadata_props[RECORD_KEY] = json.dumps(record)
    ir.save(model, path)
    return path


def decoder(path: Path) -> Path:
    """A file with the inputs of a decoder with a cache of one layer, which adds up what it is given."""
    names = {"input_ids": 2, "attention_mask": 2, "position_ids": 2}
    inputs = [_value(name, ir.DataType.INT64, ["batch", f"{name}_length"]) for name in names]
    cache = [
        _value(f"past_key_values.0.{part}", ir.DataType.FLOAT, ["batch", HEADS, "past", WIDTH])
        for part in ("key", "value")
    ]
    table = ir.Value(
        name="table", shape=ir.Shape([WORDS, 5]), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.ones((WORDS, 5), np.float32), name="table"),
    )  # fmt: skip
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([0, 1, 2, 3]), name="axes"))
    rows = ir.node("Gather", [table, inputs[0]])
    sums = [ir.node("ReduceSum", [one, axes], {"keepdims": 0}) for one in cache]
    both = ir.node("Add", [sums[0].outputs[0], sums[1].outputs[0]])
    masks = [ir.node("ReduceSum", [one], {"keepdims": 0}) for one in inputs[1:]]
    counts = [ir.node("Cast", [one.outputs[0]], {"to": ir.DataType.FLOAT}) for one in masks]
    all_of_it = ir.node("Sum", [both.outputs[0], *(one.outputs[0] for one in counts)])
    logits = ir.node("Add", [rows.outputs[0], all_of_it.outputs[0]])
    out = logits.outputs[0]
    out.name, out.type, out.shape = "logits", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "length", 5])
    nodes = [rows, *sums, both, *masks, *counts, all_of_it, logits]
    graph = ir.Graph([*inputs, *cache], [out], nodes=nodes, initializers=[table, axes], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def _value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def test_dense_beside_pruned(folder: Path) -> None:
    found = bench([folder / "dense", folder / "pruned"], Running(rounds=4))
    assert [(one.file, one.kind, one.base) for one in found.measured] == [
        ("dense/model.onnx", "run", "dense/model.onnx"),
        ("pruned/model.onnx", "run", "dense/model.onnx"),
    ]
    assert all(0 < one.median_ms <= one.p90_ms and one.tokens_per_second is None for one in found.measured)
    dense, pruned = found.files
    assert dense.bytes == (folder / "dense" / "model.onnx").stat().st_size > pruned.bytes
    assert dense.peak_bytes and dense.rest_bytes and dense.peak_bytes > dense.rest_bytes > 0
    assert [(t.what, t.kind, t.ratio) for t in found.timings()] == [
        ("pruned/model.onnx", "measured", found.measured[1].speedup)
    ]
    assert json.loads(json.dumps(found.to_json()))["measured"][1]["base"] == "dense/model.onnx"


def shape_of(path: Path, sizes: Sizes) -> tuple[int, ...]:
    (one,) = workloads(path, open_session(path), sizes)
    return one.feed["x"].shape


def test_open_sizes_are_asked_for_recorded_or_guessed(tmp_path: Path) -> None:
    path = perceptron(tmp_path / "a.onnx", 4)
    assert shape_of(path, Sizes())[::2] == (1, 6)
    assert shape_of(path, Sizes(batch=3))[0] == 3
    assert shape_of(path, Sizes({"steps": 5}, batch=3)) == shape_of(path, Sizes({"x:1": 5}, batch=3)) == (3, 5, 6)
    assert shape_of(path, Sizes({"batch": 7}, batch=3))[0] == shape_of(path, Sizes({"x:0": 7}, batch=3))[0] == 7
    described = {"tensor": [2, 33, 6], "dtype": "float32"}
    for number, inputs in enumerate(({"args": [described], "kwargs": {}}, {"args": [], "kwargs": {"x": described}})):
        recorded = perceptron(tmp_path / f"recorded{number}.onnx", 4, {"inputs": inputs})
        assert shape_of(recorded, Sizes()) == (1, 33, 6)
        assert shape_of(recorded, Sizes({"steps": 5})) == (1, 5, 6)
    for odd in ({"inputs": "?"}, {"inputs": {"args": 3}}, {"inputs": {"unknown": "Odd"}}):
        assert shape_of(perceptron(tmp_path / "odd.onnx", 4, odd), Sizes())[0] == 1


def test_a_decoder_with_a_cache_is_run_on_a_prompt_and_on_one_token_after_it(tmp_path: Path) -> None:
    path = decoder(tmp_path / "decoder.onnx")
    prefill, decode = workloads(path, open_session(path), Sizes(batch=2, prompt=9))
    assert (prefill.kind, prefill.tokens, decode.kind, decode.tokens) == ("prefill", 18, "decode", 2)
    shapes = {name: array.shape for name, array in prefill.feed.items()}
    assert shapes["input_ids"] == shapes["attention_mask"] == shapes["position_ids"] == (2, 9)
    assert shapes["past_key_values.0.key"] == shapes["past_key_values.0.value"] == (2, HEADS, 0, WIDTH)
    shapes = {name: array.shape for name, array in decode.feed.items()}
    assert (shapes["input_ids"], shapes["attention_mask"]) == ((2, 1), (2, 10))
    assert shapes["past_key_values.0.key"] == (2, HEADS, 9, WIDTH)
    assert prefill.feed["position_ids"][1].tolist() == list(range(9))
    assert prefill.feed["input_ids"].min() >= 0 and prefill.feed["input_ids"].max() < WORDS


def test_prefill_and_decode_have_tokens_per_second_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        decoder(tmp_path / name / "decoder.onnx")
    found = bench([tmp_path / "a", tmp_path / "b"], Running(rounds=2, sizes=Sizes(prompt=6), memory=False))
    assert [one.kind for one in found.measured] == ["prefill", "decode"] * 2
    for one in found.measured:
        tokens = 6 if one.kind == "prefill" else 1
        assert one.tokens_per_second == pytest.approx(1000 * tokens / one.median_ms)
    assert [t.what for t in found.timings()] == ["b/decoder.onnx, prefill", "b/decoder.onnx, decode"]
    assert found.files[0].peak_bytes is None


def test_files_that_take_something_else_are_not_compared(folder: Path, tmp_path: Path) -> None:
    decoder(tmp_path / "other.onnx")
    found = bench([folder / "dense", tmp_path / "other.onnx"], Running(rounds=1, memory=False))
    assert [one.base for one in found.measured] == ["model.onnx", "other.onnx", "other.onnx"]
    assert found.timings() == ()
    sized = Sizes({"steps": 5, "past": 4})  # each is left open by one of the files
    found = bench([folder / "dense", tmp_path / "other.onnx"], Running(rounds=1, sizes=sized, memory=False))
    assert found.measured[0].shapes == "x 1x5x6"


def test_runs_are_interleaved_and_turn_around_after_a_warm_up() -> None:
    order: list[str] = []

    def call(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, 2)
    assert "".join(order) == "abbaab" + "baab"
    assert found == {"a": (8.0, 9.0), "b": (7.0, 10.0)}
    assert Latency(tuple(map(float, range(1, 12))), 1).p90_ms == 10


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere", "doesn't exist"),
        ("notes.txt", "neither an ONNX file"),
        ("empty", "is empty"),
        ("text", "holds no ONNX"),
    ],
)
def test_what_is_no_onnx_file_is_refused_in_a_sentence(path: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    shutil.copy(tmp_path / "notes.txt", tmp_path / "text")
    with pytest.raises(ModelError, match=says):
        bench([tmp_path / path])


def test_broken_files_and_sizes_are_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_text("not a model")
    with pytest.raises((ExportError, ModelError), match=r"broken\.onnx"):
        bench([tmp_path / "broken.onnx"])
    with pytest.raises(ModelError, match="leaves a dim 'height' open; open are"):
        bench([folder / "dense"], Running(sizes=Sizes({"height": 3})))
    with pytest.raises(ModelError, match="nothing to measure"):
        bench([])
    for wrong in (0, -1, True):
        with pytest.raises(ExportError, match="whole number"):
            Running(rounds=wrong)
        with pytest.raises(ModelError, match="whole number"):
            Sizes(batch=wrong)


def test_the_command_prints_a_table_or_json(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["bench", str(folder / "dense"), str(folder / "pruned"), "--rounds", "2", "--no-memory"]
    assert cli.main(given) == 0
    shown = capfd.readouterr().out
    assert "times as fast" in shown and "pruned/model.onnx" in shown and "2 interleaved rounds" in shown
    assert cli.main([*given, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["measured"]) == 2
    assert cli.main(["bench", str(folder / "nowhere")]) == 2
    assert cli.main(["bench", str(folder / "dense"), "--dim", "height"]) == 2
    assert "--dim 'height': give a name and a size" in capfd.readouterr().err
