"""Scores from activations and compensation of files, with ONNX Runtime as the engine: as for the module they are from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import depgraph
import importance
from depgraph.errors import DataError, ScoreError
from depgraph.npz import NpzFolder
from importance.activation import CRITERIA
from tests.onnx_door.both import Doors
from tests.onnx_door.building import loaded, mlp, model, node, value, weights


def _by_member(graph: Any, scores: dict[str, np.ndarray]) -> dict[tuple[str, int, int], np.ndarray]:
    """Scores by the parameters that an axis reaches, under whichever name that has; the same behind both doors."""
    found = {}
    for name, array in scores.items():
        first = min((m.target, m.dim) for m in graph[name].members if m.kind == "parameter" and "." in m.target)
        found[(*first, len(array))] = array
    return found


@pytest.mark.parametrize("criterion", [*CRITERIA, "obs"])
def test_scores_are_those_of_the_module(doors: Doors, criterion: str) -> None:
    data = doors.batches
    scorer: Any = importance.OptimalBrain(data) if criterion == "obs" else importance.Activation(data, criterion)
    module, file = _by_member(doors.module, scorer(doors.module)), _by_member(doors.file, scorer(doors.file))
    assert module.keys() == file.keys()
    for key, scores in module.items():
        np.testing.assert_allclose(file[key], scores, rtol=2e-3, atol=1e-4 * np.abs(scores).max())


@pytest.mark.parametrize("name", ["flap", "obs", "wanda_sp", "cfsp", "owl"])
def test_a_recipe_prunes_a_file(doors: Doors, name: str) -> None:
    pruned = importance.recipes.named(name, doors.batches).prune(doors.file, depgraph.Target(params=0.7))
    assert pruned.report is not None and pruned.report.check is not None and not pruned.report.check.vacuous
    onnx.checker.check_model(ir.to_proto(pruned.model), full_check=True)
    assert depgraph.trace(pruned.model).dense_cost.params <= 0.72 * doors.file.dense_cost.params


def _plan(doors: Doors) -> Any:
    sizes = {axis.name: axis.size for axis in doors.file.axes if axis.size in (8, 24)}
    return doors.file.cut_plan({name: range(0, size, 3) for name, size in sizes.items()})


def _error(doors: Doors, model: Any) -> float:
    with torch.no_grad():
        apart = [doors.run(model, batch) - doors.model(batch) for batch in doors.batches]
    return float(torch.cat(apart).norm())


@pytest.mark.parametrize(
    "how",
    [
        importance.Compensation("bias"),
        importance.Compensation("least-squares"),
        importance.Compensation("least-squares", biases="none"),
    ],
)
def test_compensation_brings_outputs_nearer_and_leaves_a_sound_file(doors: Doors, how: importance.Compensation) -> None:
    plan = _plan(doors)
    plain, made = plan.apply(), plan.apply()
    done = importance.compensate(made, plan, doors.batches, how)
    assert done.changed and not done.left
    assert len(done.created) == (2 if how.biases == "create" else 0)  # of the MLPs' last maps, which have none
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert _error(doors, made) < 0.8 * _error(doors, plain)


def test_compensation_is_that_of_the_module(doors: Doors) -> None:
    wide = [axis.name for axis in doors.module.axes if axis.size == 24]
    assert all(name in doors.file.widths.axes for name in wide)
    results = []
    for graph in (doors.module, doors.file):
        plan = graph.cut_plan({name: range(0, 24, 3) for name in wide})
        made = plan.apply()
        importance.compensate(made, plan, doors.batches, importance.Compensation())
        results.append(made(doors.batches[0]) if graph is doors.module else doors.run(made, doors.batches[0]))
    torch.testing.assert_close(results[1], results[0].detach(), rtol=1e-3, atol=1e-4)


def test_refitting_goes_through_the_file_operator_by_operator(doors: Doors) -> None:
    plan = _plan(doors)
    plain, made = plan.apply(), plan.apply()
    done = importance.refit(made, plan, doors.batches, importance.Compensation(biases="existing"))
    assert len(done.changed) > 10
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert _error(doors, made) < 0.5 * _error(doors, plain)


def test_refitting_that_fails_leaves_the_file_as_it_was(doors: Doors) -> None:
    plan = _plan(doors)
    made = plan.apply()
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    with pytest.raises(ScoreError, match="NaN or infinity"):
        importance.refit(made, plan, [doors.batches[0], torch.full((4, 3, 8, 8), torch.inf)])
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


def test_batch_norms_are_re_estimated(doors: Doors) -> None:
    made = doors.file.cut_plan().apply()
    assert len(importance.reestimate(made, doors.batches)) == 1
    again = doors.file.cut_plan().apply()
    norm = importance.reestimate(again, doors.batches[:1])
    (kept,) = [n for n in again.graph if n.op_type == "BatchNormalization"]
    conv = doors.model.conv(doors.batches[0])  # type: ignore[operator]
    np.testing.assert_allclose(kept.inputs[3].const_value.numpy(), conv.mean((0, 2, 3)).detach(), atol=1e-5)
    np.testing.assert_allclose(kept.inputs[4].const_value.numpy(), conv.var((0, 2, 3)).detach(), rtol=1e-4)
    assert norm and _error(doors, made) > 0


def test_batches_come_from_a_folder_of_npz_files(tmp_path: Path, doors: Doors) -> None:
    for k, batch in enumerate(doors.batches):
        np.savez(tmp_path / f"{k}.npz", x=batch.numpy())
    there, here = (
        importance.Activation(b, "wanda-sp")(doors.file)
        for b in (NpzFolder(tmp_path), ({"x": b} for b in doors.batches))
    )
    assert all(np.array_equal(there[name], here[name]) for name in here)
    (tmp_path / "3.npz").write_bytes(b"not one")
    with pytest.raises(DataError, match=r"3\.npz can't be read"):
        importance.Activation(NpzFolder(tmp_path))(doors.file)
    with pytest.raises(DataError, match=r"has no \.npz files"):
        NpzFolder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"x": np.zeros((4, 7), np.float32)}, "has shape"),
        ({"z": np.zeros((4, 6), np.float32)}, "it has none of the inputs x"),
        ({"x": np.zeros((4, 6), np.int64)}, "holds int64 where the file wants float32"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(batch: dict[str, np.ndarray], says: str) -> None:
    graph = depgraph.trace(loaded(mlp()))
    with pytest.raises(DataError, match=says):
        importance.collect(graph, [batch], [importance.Moments()])


def test_what_flows_inside_bodies_is_seen() -> None:
    """The neurons of h are read in a branch and in a loop only."""
    one = helper.make_graph([node("MatMul", "h v", "a")], "one", [], [value("a", [2, 8])], weights(v=(16, 8)))
    other = helper.make_graph([node("MatMul", "h u", "c")], "other", [], [value("c", [2, 8])], weights(u=(16, 8)))
    body = helper.make_graph(
        [node("MatMul", "s m", "b"), node("Tanh", "b", "t"), node("Identity", "go", "on")],
        "body",
        [value("k", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("s", [2, 8])],
        [value("on", [], TensorProto.BOOL), value("t", [2, 8])],
        weights(m=(8, 8)),
    )
    nodes = [
        node("MatMul", "x w", "h"),
        node("If", "flag", "r", then_branch=one, else_branch=other),
        node("Loop", "three yes r", "o", body=body),
        node("Identity", "o", "y"),
    ]
    held = [numpy_helper.from_array(np.array(3), "three"), numpy_helper.from_array(np.array(True), "yes")]
    inputs = [value("x", [2, 6]), value("flag", [], TensorProto.BOOL)]
    graph = depgraph.trace(
        loaded(model(nodes, inputs, [value("y", [2, 8])], [*weights(w=(6, 16)), *held])),
        {"x": np.ones((2, 6), np.float32), "flag": np.array(True)},
        free=["output 0"],
    )
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    found = importance.collect(graph, [{"x": x, "flag": np.array(True)}] * 2, [importance.Norms()])
    seen = {c.weight: found.of(c, importance.Norms()) for c in found.consumers if c.key in found.found}
    h = x @ graph.array("w")
    np.testing.assert_allclose(seen["v"].squares, 2 * (h**2).sum(0), rtol=1e-4)
    rounds = [h @ graph.array("v")]
    rounds += [s := np.tanh(rounds[0] @ graph.array("m")), np.tanh(s @ graph.array("m"))]
    np.testing.assert_allclose(seen["m"].squares, 2 * sum((r**2).sum(0) for r in rounds), rtol=1e-4)
    assert "u" not in seen


def test_a_file_that_is_run_piece_by_piece_gives_the_same(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = importance.Activation(doors.batches, "flap")(doors.file)
    monkeypatch.setattr("depgraph.onnx_door.running._INLINE", 0)
    monkeypatch.setattr("depgraph.onnx_door.pieces._PIECE", 1000)
    pieces = importance.Activation(doors.batches, "flap")(doors.file)
    for name, scores in whole.items():
        np.testing.assert_allclose(pieces[name], scores, atol=1e-4)


NEEDING = {
    "Taylor": importance.Taylor,
    "Fisher": importance.Fisher,
    "GradientBlend": importance.GradientBlend,
    "Surgeon": importance.Surgeon,
    "DepthTaylor": importance.depth.DepthTaylor,
}


@pytest.mark.parametrize("name", NEEDING)
def test_what_needs_gradients_is_refused_by_name(name: str) -> None:
    graph = depgraph.trace(loaded(mlp()))
    with pytest.raises(ScoreError, match=f"{name} needs gradients, .* load the PyTorch model and trace that"):
        NEEDING[name]([{"x": np.zeros((2, 6), np.float32)}])(graph)


def test_our_recipe_says_how_it_does_without_gradients(doors: Doors) -> None:
    with pytest.raises(ScoreError, match=r'weight="share"'):
        importance.recipes.best(doors.batches).plan(doors.file, depgraph.Target(params=0.7))
    best = importance.recipes.best(doors.batches, weight="share").prune(doors.file, depgraph.Target(params=0.7))
    assert best.compensated is not None and best.compensated.changed


def test_a_file_is_pruned_in_steps_and_without_data(doors: Doors) -> None:
    done = importance.Schedule(steps=2).apply(doors.file, importance.Magnitude(), depgraph.Target(params=0.6))
    assert len(done.steps) == 2 and depgraph.trace(done.model).dense_cost.params <= 0.6 * doors.file.dense_cost.params
    batches = importance.noise(doors.file, 8)
    assert [batch["x"].shape for batch in batches] == [(4, 3, 8, 8)] * 2
    assert importance.OptimalBrain(batches)(doors.file)
