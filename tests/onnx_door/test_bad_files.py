"""Files that are no sound ONNX models: one sentence, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import depgraph
import importance
from depgraph import rules
from depgraph.cli import main
from depgraph.errors import CaptureError, CheckError, CheckpointError, DepgraphError, ScoreError
from depgraph.rules import registry
from tests.onnx_door.building import loaded, mlp, model, node, value, weights


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _truncated(path: Path) -> Path:
    return _written(path, mlp().SerializeToString()[:300])


def _text(path: Path) -> Path:
    return _written(path, b"this is no model, and it never was one\n")


def _empty(path: Path) -> Path:
    return _written(path, b"")


def _aside(path: Path) -> Path:
    onnx.save(mlp(), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    return path


def _without_data(path: Path) -> Path:
    _aside(path)
    (path.parent / "weights.data").unlink()
    return path


def _with_short_data(path: Path) -> Path:
    _aside(path)
    (path.parent / "weights.data").write_bytes(b"\0" * 40)
    return path


def _cyclic(path: Path) -> Path:
    nodes = [node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")]
    return _written(path, model(nodes, [value("x", [2, 3])], [value("y", [2, 3])]).SerializeToString())


def _of_nothing(path: Path) -> Path:
    nodes = [node("Add", "x nowhere", "y")]
    return _written(path, model(nodes, [value("x", [2, 3])], [value("y", [2, 3])]).SerializeToString())


def _wrong_shapes(path: Path) -> Path:
    nodes = [node("MatMul", "x w", "y")]
    held = weights(w=(5, 4))
    return _written(path, model(nodes, [value("x", [2, 3])], [value("y", [2, 4])], held).SerializeToString())


def _wrong_size(path: Path) -> Path:
    made = mlp()
    made.graph.initializer[0].raw_data = made.graph.initializer[0].raw_data[:-8]
    return _written(path, made.SerializeToString())


def _without_operators(path: Path) -> Path:
    return _written(path, onnx.ModelProto(ir_version=10).SerializeToString())


def _without_body(path: Path) -> Path:
    nodes = [node("Loop", "n - x", "y")]
    held = [onnx.numpy_helper.from_array(np.array(2), "n")]
    return _written(path, model(nodes, [value("x", [2, 3])], [value("y", [2, 3])], held).SerializeToString())


def _of_no_version(path: Path) -> Path:
    made = mlp()
    made.opset_import[0].version = 1 << 40
    return _written(path, made.SerializeToString())


def _of_no_such_attribute(path: Path) -> Path:
    made = mlp()
    made.graph.node[0].attribute.append(onnx.helper.make_attribute("warped", 3))
    return _written(path, made.SerializeToString())


BAD: list[tuple[Callable[[Path], Path], type[DepgraphError], str]] = [
    (_truncated, CaptureError, "can't be read as an ONNX file"),
    (_text, CaptureError, "can't be read as an ONNX file"),
    (_empty, CaptureError, "is empty"),
    (_without_data, CheckpointError, "weights.data, which doesn't exist: copy it there"),
    (_with_short_data, CheckpointError, "weights.data ends before the data of"),
    (_cyclic, CaptureError, "reads 'b' in a cycle"),
    (_of_nothing, CaptureError, "reads 'nowhere', which nothing makes"),
    (_wrong_shapes, CaptureError, "MatMul 'y'"),
    (_wrong_size, CaptureError, "bytes of data, not"),
    (_without_body, CaptureError, "Loop 'y' has no body"),
    (_of_no_version, CaptureError, "No Op registered for Gemm"),
    (_of_no_such_attribute, CaptureError, "^Gemm 'h': Unrecognized attribute: warped"),
    (_without_operators, CaptureError, "holds no operators"),
    (lambda path: path, CheckpointError, "there is no file"),
]


@pytest.mark.parametrize(("make", "error", "says"), BAD)
def test_a_bad_file_gives_one_sentence_and_no_output(
    make: Callable[[Path], Path],
    error: type[DepgraphError],
    says: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = make(tmp_path / "bad.onnx")
    with pytest.raises(error, match=says.replace("(", r"\(")):
        depgraph.trace(path)
    out = tmp_path / "out.onnx"
    assert main(["prune", str(path), "--keep", "params=0.5", "--out", str(out)]) in (3, 7)
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("batch", [2, "n"])
def test_an_operator_of_an_unknown_domain_is_named_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int | str
) -> None:
    monkeypatch.setattr(registry, "_TABLE", rules.table())
    nodes = [
        node("Gemm", "x w b", "h", transB=1),
        node("Warp", "h", "r", domain="my.own"),
        node("Gemm", "r v c", "y", transB=1),
    ]
    held = weights(w=(16, 6), b=(16,), v=(3, 16), c=(3,))
    made = model(nodes, [value("x", [batch, 6])], [value("y", [batch, 3])], held, values=[value("r", [batch, 16])])
    path = _written(tmp_path / "odd.onnx", made.SerializeToString())
    graph = depgraph.trace(path)
    assert list(graph.unknown) == ["own.Warp"]
    assert not any(axis.prunable.any() for axis in graph.axes)
    with pytest.raises(depgraph.errors.UnsupportedOperator, match="own.Warp"):
        depgraph.trace(path, strict=True)
    depgraph.rule("own.Warp", "... c -> ... c")
    plan = depgraph.trace(path).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    with pytest.raises(CheckError, match="itself can't be run"):
        plan.apply()
    assert plan.apply(check="none").graph.initializers["v"].shape[1] < 16


def test_only_what_has_no_rule_is_said_to_have_none() -> None:
    """What comes after an operator that nobody knows has sizes that nothing tells."""
    nodes = [node("MatMul", "x w", "h"), node("Warp", "h", "r", domain="my.own"), node("MatMul", "r v", "y")]
    graph = depgraph.trace(
        loaded(model(nodes, [value("x", [2, 6])], [value("y", [2, 3])], weights(w=(6, 16), v=(16, 3))))
    )
    assert list(graph.unknown) == ["own.Warp"]
    assert "it meets sizes that neither the file nor a run tells" in graph.show()


def test_inputs_that_do_not_fit_are_named() -> None:
    made = mlp()
    with pytest.raises(CaptureError, match="has no input 'z'; it takes 'x'"):
        depgraph.trace(loaded(made), {"z": [[1.0]]})
    with pytest.raises(CaptureError, match="has shape"):
        depgraph.trace(loaded(made), {"x": [[1.0, 2.0]]})
    assert depgraph.trace(loaded(made), {"n": 5}).inputs["x"].shape == (5, 6)
    with pytest.raises(CaptureError, match="the open size 'n' can't be -3: give a whole number"):
        depgraph.trace(loaded(made), {"n": -3})


def test_scores_from_gradients_are_refused_by_name() -> None:
    graph = depgraph.trace(loaded(mlp()))
    with pytest.raises(ScoreError, match="Taylor needs gradients, .* load the PyTorch model"):
        graph.plan(importance.Taylor([1]), depgraph.Target(params=0.5))


def test_a_weight_that_is_not_finite_is_named() -> None:
    made = mlp()
    held = onnx.numpy_helper.to_array(made.graph.initializer[2]).copy()
    held[0, 0] = float("nan")
    made.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(held, "v"))
    graph = depgraph.trace(loaded(made))
    with pytest.raises(ScoreError, match="'v' holds NaN"):
        graph.plan(importance.Random(0), depgraph.Target(params=0.5))


def test_what_doesnt_run_before_the_cut_either_is_said_to() -> None:
    nodes = [
        node("Gemm", "x w b", "h", transB=1), node("Foo", "h", "f", domain="com.nobody"), node("Gemm", "f v c", "g", transB=1),
        node("Relu", "g", "r"), node("Gemm", "r u d", "y", transB=1),
    ]  # fmt: skip
    held = weights(w=(16, 6), b=(16,), v=(12, 16), c=(12,), u=(3, 12), d=(3,))
    values = [value("h", [2, 16]), value("f", [2, 16])]
    graph = depgraph.trace(loaded(model(nodes, [value("x", [2, 6])], [value("y", [2, 3])], held, values=values)))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8))
    with pytest.raises(CheckError, match="built itself can't be run"):
        plan.apply()


def test_infinite_numbers_that_mask_scores_are_no_damage() -> None:
    nodes = [
        node("MatMul", "x q", "a"), node("MatMul", "x k", "b"), node("Transpose", "b", "t", perm=[0, 2, 1]), node("MatMul", "a t", "s"),
        node("Where", "m zero low", "n"), node("Add", "s n", "o"), node("Softmax", "o", "p", axis=-1), node("MatMul", "x v", "c"),
        node("MatMul", "p c", "y"),
    ]  # fmt: skip
    held = weights(q=(6, 8), k=(6, 8), v=(6, 3))
    held += [
        onnx.numpy_helper.from_array(np.array([z], np.float32), name) for z, name in ((0, "zero"), (-np.inf, "low"))
    ]
    inputs = [value("x", [2, 4, 6]), value("m", [4, 4], onnx.TensorProto.BOOL)]
    made = loaded(model(nodes, inputs, [value("y", [2, 4, 3])], held))
    graph = depgraph.trace(
        made,
        {"x": np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32), "m": np.tril(np.ones((4, 4), bool))},
    )
    assert not graph.plan(importance.Magnitude(), depgraph.Target(macs=0.9)).apply_with_report().check.vacuous


def test_numbers_that_are_too_many_for_their_shape_are_no_traceback(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x to", "r"), node("Relu", "r", "y")]
    to = onnx.helper.make_tensor("to", onnx.TensorProto.INT64, [2], [2, 6])
    to.int64_data.append(1)
    path = _written(
        tmp_path / "odd.onnx", model(nodes, [value("x", [3, 4])], [value("y", [2, 6])], [to]).SerializeToString()
    )
    with pytest.raises(CaptureError, match=r"odd.onnx can't be understood .* export it again"):
        depgraph.trace(path)


def test_a_shape_that_the_runtime_sees_otherwise_is_said_in_one_sentence() -> None:
    """A flag that is neither 0 nor 1 is a yes to onnx's own evaluation and a no to ONNX Runtime."""
    nodes = [node("ReduceL2", "w", "y", axes=[0], keepdims=2)]
    graph = depgraph.trace(
        loaded(model(nodes, [], [value("y", [1, 6])], weights(w=(4, 6)), opset=13)), free=["output 0"]
    )
    plan = graph.cut_plan({axis.name: [0] for axis in graph.axes if axis.size == 6})
    with pytest.raises(CheckError, match=r"'y' is of shape \(6,\) in ONNX Runtime, where the file says \(1, 6\)"):
        plan.apply()


def test_an_operator_that_does_not_fit_its_operands_is_refused() -> None:
    nodes = [node("GRU", "x w r", "y", hidden_size=4)]
    held = weights(w=(1, 9, 3), r=(1, 12, 4))
    broken = loaded(model(nodes, [value("x", [5, 2, 3])], [value("y", [5, 1, 2, 4])], held))
    with pytest.raises(DepgraphError):
        graph = depgraph.trace(broken)
        graph.plan(importance.Magnitude(), depgraph.Target(macs=0.7)).apply()


def test_a_scan_of_before_is_refused_with_what_to_do() -> None:
    body = onnx.helper.make_graph(
        [node("Add", "s x", "t"), node("Identity", "t", "y")], "body",
        [value("s", [2]), value("x", [2])], [value("t", [2]), value("y", [2])],
    )  # fmt: skip
    nodes = [node("Scan", "- s0 xs", "last ys", body=body, num_scan_inputs=1)]
    made = model(
        nodes, [value("s0", [1, 2]), value("xs", [1, 3, 2])], [value("last", [1, 2]), value("ys", [1, 3, 2])], opset=8
    )
    with pytest.raises(CaptureError, match="Scan of operator set 8"):
        depgraph.trace(loaded(made))
