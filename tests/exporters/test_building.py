"""From a budget to a folder that runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import CheckpointError, ExportError, NothingToPrune, TargetError
from depgraph.story import Story
from exporters.building import Budget, Subject, Ways, build
from exporters.building.file_model import FileModel
from exporters.building.limits import Limits
from exporters.building.precisions import Precision, file_bytes
from exporters.building.pruning import Pruner
from exporters.onnx_export import to_onnx
from importance.sweeping import Figure

QUICK = Ways(recipes=("magnitude",), shares=(0.5,), probes=2)


def _network() -> nn.Module:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), *head).eval()


@pytest.fixture
def subject() -> Subject:
    model, images = _network(), torch.randn(4, 3, 12, 12)
    dense = model(images).detach()

    def distance(other: nn.Module) -> float:
        with torch.no_grad():
            return float((other(images) - dense).norm() / dense.norm())

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return (output - dense).square().mean() + output.square().mean()

    return Subject(model, (images,), {}, distance, Figure("distance"), [(images,)], loss)


def _dense_bytes(subject: Subject, folder: Path) -> int:
    to_onnx(subject.model, subject.args, folder / "dense.onnx")
    return file_bytes(folder / "dense.onnx")


def test_the_folder_keeps_within_its_bytes_and_runs(subject: Subject, tmp_path: Path) -> None:
    most = int(_dense_bytes(subject, tmp_path) * 0.6)
    built = build(subject, Budget(bytes=most), tmp_path / "small", QUICK, command="depgraph build x")
    folder = tmp_path / "small"
    assert 0.5 * most < file_bytes(folder / "model.onnx") <= most
    done = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True, check=True)
    assert "output: float32 [4, 10]" in done.stdout and "median of 20 runs" in done.stdout
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    with np.load(folder / "example.npz") as arrays:
        (made,) = session.run(None, dict(arrays))
    expected = built.best.model(*subject.args).detach().numpy()
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    again = depgraph.load(folder / "pytorch", model=_network())
    torch.testing.assert_close(again(*subject.args), built.best.model(*subject.args))
    graph = depgraph.trace(subject.model, subject.args)
    assert depgraph.Plan.load(graph, folder / "plan.json").cost() == built.story.after
    assert (
        not subject.model.training and sum(p.numel() for p in subject.model.parameters()) == built.story.before.params
    )


@pytest.fixture
def measured() -> None:
    """Asks for operators to be measured."""


def test_the_report_tells_what_was_done(subject: Subject, measured: None, tmp_path: Path) -> None:
    most = int(_dense_bytes(subject, tmp_path) * 0.6)
    build(subject, Budget(bytes=most), tmp_path / "small", QUICK, command="depgraph build x")
    story = Story.load(tmp_path / "small" / "report.json")
    assert story.making.command == "depgraph build x" and story.making.recipe == "magnitude"
    assert story.check is not None and story.check.error < 1e-4
    assert [q.name for q in story.quality] == ["distance"] and story.quality[0].before == 0 < story.quality[0].after  # type: ignore[operator]
    assert story.tradeoff is not None and story.tradeoff.chosen == 0 and len(story.tradeoff.trials) == 2
    cut = [axis for axis in story.axes if axis.removed]
    assert cut and all(list(axis.scores) == sorted(axis.scores) and axis.gone[0] == 1 > axis.gone[-1] for axis in cut)
    assert story.sensitivity is not None and len(story.sensitivity.curves) == 2
    predicted, measured = story.timings
    assert (predicted.kind, measured.kind) == ("predicted", "measured")
    assert predicted.dense_ms and predicted.pruned_ms and predicted.pruned_ms < predicted.dense_ms
    (file,) = story.files
    assert file.bytes <= most < (file.dense_bytes or 0)
    page = (tmp_path / "small" / "report.html").read_text()
    assert "depgraph build x" in page and "http://" not in page.replace("http://www.w3.org", "")


class _Clock:
    """A latency model by the clock of the test: milliseconds are the parameters that are left, in thousands."""

    notes: tuple[str, ...] = ()

    def __init__(self, graph: depgraph.DependencyGraph) -> None:
        self.graph = graph
        self.dense_ms = self.ms(graph.widths.at({}))

    @classmethod
    def of(cls, graph: depgraph.DependencyGraph, profile: Any = None, **_: Any) -> _Clock:
        return cls(graph)

    def ms(self, kept: Any) -> float:
        gone = self.graph.left_out(kept.left_out)
        return float(kept.cost(gone.parameters, gone.nodes).params) / 1000

    def parts(self, kept: Any) -> dict[str, float]:
        return {"all": self.ms(kept)}


@pytest.fixture(autouse=True)
def _no_measuring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators are measured in the tests that ask for it."""
    from exporters.building import predicting

    if "measured" not in request.fixturenames:
        monkeypatch.setattr(predicting, "MeasuredLatency", _Clock)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many times the predicted share files take, for one round after the other; the last goes on."""
    from exporters.building import search

    factors = [1.0]

    def side_by_side(files: dict[str, Path], feeds: Any, threads: int) -> dict[str, float]:
        import onnx

        def params(path: Path) -> int:
            return sum(int(np.prod(t.dims)) for t in onnx.load(str(path)).graph.initializer)

        factor = factors.pop(0) if len(factors) > 1 else factors[0]
        dense, made = params(files["dense"]), params(files["made"])
        return {"dense": float(dense), "made": made * factor}

    monkeypatch.setattr(search, "side_by_side", side_by_side)
    return factors


@pytest.mark.ci
def test_what_measures_above_the_budget_is_made_smaller(subject: Subject, tmp_path: Path, clock: list[float]) -> None:
    dense = sum(p.numel() for p in subject.model.parameters()) / 1000
    first = build(subject, Budget(latency_ms=dense * 0.7), tmp_path / "first", QUICK)
    assert first.best.rounds == 1 and 0.6 < first.best.ratio <= 0.7
    clock[:] = [1.2, 1.2, 1.0]
    second = build(subject, Budget(latency_ms=dense * 0.7), tmp_path / "second", QUICK)
    assert second.best.rounds > 1 and second.best.ratio <= 0.7
    assert second.story.after.params < first.story.after.params
    assert [t.kind for t in second.story.timings] == ["predicted", "measured"]


def test_what_nothing_keeps_within_says_what_came_nearest(subject: Subject, tmp_path: Path, clock: list[float]) -> None:
    dense = sum(p.numel() for p in subject.model.parameters()) / 1000
    clock[:] = [50.0]
    with pytest.raises(
        TargetError, match=r"nothing keeps within .* ms; nearest came magnitude in float32, which takes .* ms of .*"
    ):
        build(subject, Budget(latency_ms=dense * 0.7), tmp_path / "small", replace(QUICK, rounds=1))
    floor = replace(QUICK, options={"floor": 0.5})
    with pytest.raises(
        TargetError, match=r"within 9 kB: .*allow a file of 2\d\.\d+ kB .* at the least, by magnitude in float32"
    ):
        build(subject, Budget(bytes=9000), tmp_path / "small", floor)
    with pytest.raises(
        TargetError, match=r"nothing keeps within 100 B: .* allow a file of \d\.\d+ kB \(.* kB without weights\)"
    ):
        build(subject, Budget(bytes=100), tmp_path / "small", QUICK)
    assert not (tmp_path / "small").exists()


@pytest.mark.ci
def test_what_another_round_can_not_reach_is_made_at_the_least(
    subject: Subject, tmp_path: Path, clock: list[float]
) -> None:
    graph, floors = depgraph.trace(subject.model, subject.args), {"floor": 0.5}
    with pytest.raises(TargetError) as caught:
        graph.plan(importance.Magnitude(), depgraph.Target(latency_ms=0.001, latency=_Clock(graph)), **floors)
    assert caught.value.unmet is not None
    budget = Budget(latency_ms=caught.value.unmet.least["latency"] * 1.1)
    ways = replace(QUICK, options=floors)
    clock[:] = [1.2, 1.05]  # the first is made anew for a time below the least, which measures within the budget
    assert build(subject, budget, tmp_path / "small", ways).best.ratio <= 1.1
    clock[:] = [1.2, 1.15]
    with pytest.raises(TargetError, match=r"nearest came magnitude in float32, which takes .* ms of") as nearest:
        build(subject, budget, tmp_path / "none", ways)
    assert nearest.value.above == pytest.approx(1.15 / 1.1, rel=0.01)


def test_a_model_within_the_budget_stays_as_it_is(subject: Subject, tmp_path: Path) -> None:
    built = build(subject, Budget(bytes=10**9), tmp_path / "same", QUICK)
    assert built.best.plan is None and built.best.recipe == "dense"
    assert built.story.after == built.story.before and not (tmp_path / "same" / "plan.json").exists()
    assert (tmp_path / "same" / "model.onnx").is_file() and (tmp_path / "same" / "report.html").is_file()


class _Block(nn.Module):
    def __init__(self, width: int, worth: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        with torch.no_grad():
            self.mlp[2].weight.mul_(worth)
            self.mlp[2].bias.mul_(worth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


@pytest.fixture
def deep() -> Subject:
    """A model of which two blocks do nothing."""
    torch.manual_seed(0)
    blocks = [_Block(16, worth) for worth in (1, 1e-6, 2, 1e-6, 1)]
    model, x = nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 4)).eval(), torch.randn(24, 8)
    dense = model(x).detach()

    def distance(other: nn.Module) -> float:
        with torch.no_grad():
            return float((other(x) - dense).norm() / dense.norm())

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return (output - dense).square().mean()

    return Subject(model, (x,), {}, distance, Figure("distance"), [(x,)], loss)


@pytest.mark.ci
def test_blocks_that_do_nothing_are_left_out(deep: Subject, tmp_path: Path, clock: list[float]) -> None:
    dense = sum(p.numel() for p in deep.model.parameters()) / 1000
    ways = replace(QUICK, shares=(0.8,), probes=0)
    built = build(deep, Budget(latency_ms=dense * 0.65), tmp_path / "small", ways)
    assert [one.recipe for one in built.tried if not one.why] == ["depth", "magnitude after depth", "magnitude"]
    assert not any("compete" in note for note in built.story.notes)  # nobody asked for that
    assert built.best.plan is not None and set(built.best.plan.branches) == {"2", "4"}
    assert built.best.quality < 1e-3 < built.tried[2].quality
    story = Story.load(tmp_path / "small" / "report.json")
    assert {part.name for part in story.dropped if part.gone} == {"2", "4"}
    assert {layer.block for layer in story.layers if layer.gone} == {"2", "4"}
    trials = story.tradeoff.trials  # type: ignore[union-attr]
    assert "depth" in [t.name for t in trials] and len(set(trials)) == len(trials)
    page = (tmp_path / "small" / "report.html").read_text()
    assert page.count("left out") >= 2 and story.making.recipe == "depth"
    torch.manual_seed(1)
    fresh = nn.Sequential(nn.Linear(8, 16), *[_Block(16, 1) for _ in range(5)], nn.Linear(16, 4))
    again = depgraph.load(tmp_path / "small" / "pytorch", model=fresh)
    torch.testing.assert_close(again(*deep.args), built.best.model(*deep.args))


@pytest.mark.parametrize(
    "ways", [{"depth": "none"}, {"options": {"protect": ("1.mlp.0.weight",)}}, {"depth_shares": (0.0,)}]
)
def test_blocks_stay_where_that_is_asked(deep: Subject, ways: dict[str, Any]) -> None:
    graph = depgraph.trace(deep.model, deep.args)
    every = [str(way) for way in Pruner(graph, deep, QUICK, []).all()]
    assert every == ["magnitude", "magnitude after depth", "depth"]
    assert [str(way) for way in Pruner(graph, deep, replace(QUICK, **ways), []).all()] == ["magnitude"]


def test_blocks_and_groups_compete_in_one_plan(deep: Subject, tmp_path: Path, clock: list[float]) -> None:
    dense = sum(p.numel() for p in deep.model.parameters()) / 1000
    ways = replace(QUICK, recipes=("obs", "taylor"), depth_shares=("both",), shares=(), probes=0)
    built = build(deep, Budget(latency_ms=dense * 0.59), tmp_path / "small", ways)
    (one,) = built.tried
    assert one.recipe == "obs and depth" and not one.why and one.plan is not None
    assert {name.split(".")[0] for name in one.plan.branches} >= {"2", "4"}, "they do nothing"
    assert any(
        note.startswith("taylor and depth in float32: the scores") for note in built.story.notes
    )  # it is at its least


def test_what_nothing_reaches_says_the_least_of_all_ways(deep: Subject, tmp_path: Path, clock: list[float]) -> None:
    graph = depgraph.trace(deep.model, deep.args)
    ways = replace(QUICK, shares=(), probes=0)
    with pytest.raises(TargetError, match=r"nothing keeps within 0.001 ms: .* ms at the least") as caught:
        build(deep, Budget(latency_ms=0.001), tmp_path / "small", ways)
    least = float(re.search(r"([\d.]+) ms at the least", str(caught.value))[1])  # type: ignore[index]
    with pytest.raises(TargetError) as alone:
        graph.plan(importance.Magnitude(), depgraph.Target(latency_ms=0.001, latency=_Clock(graph)), scope="axis")
    widths = float(re.search(r"latency=([\d.]+) ms at the least", str(alone.value))[1])  # type: ignore[index]
    assert least < widths  # blocks went, too
    assert alone.value.above == pytest.approx(widths / 0.001, rel=0.01)


def test_what_can_not_compete_says_why(deep: Subject) -> None:
    graph = depgraph.trace(deep.model, deep.args)
    ways = replace(QUICK, recipes=("magnitude", "adapt_pruner"), depth_shares=("both",))
    with pytest.raises(
        NothingToPrune, match="scores of magnitude can't compete with blocks; adapt_pruner goes in steps"
    ):
        Pruner(graph, deep, ways, []).all()


@pytest.mark.ci
@pytest.mark.parametrize("limit", ["bytes", "latency_ms"])
def test_a_recipe_that_goes_in_steps_is_built(deep: Subject, tmp_path: Path, clock: list[float], limit: str) -> None:
    dense = sum(p.numel() for p in deep.model.parameters()) / 1000
    most = {"bytes": int(_dense_bytes(deep, tmp_path) * 0.75), "latency_ms": dense * 0.75}[limit]
    ways = replace(QUICK, recipes=("adapt_pruner",), depth_shares=(0.0,), shares=(), probes=0)
    built = build(deep, Budget(**{limit: most}), tmp_path / "small", ways)  # type: ignore[arg-type]
    best, story = built.best, built.story
    assert best.recipe == "adapt_pruner" and best.plan is not None and best.predicted is not None
    assert best.predicted == pytest.approx(best.ratio, rel=0.01)  # the clock's files take what is predicted
    assert len(story.steps) >= 5 and story.after.params == sum(p.numel() for p in best.model.parameters())
    assert any(axis.removed for axis in story.axes) and story.check is not None
    assert best.rounds < 3 and best.bytes - story.after.bytes < 6000, "what went is told elsewhere"
    assert "to keep at most" in (tmp_path / "small" / "report.html").read_text()
    graph = depgraph.trace(deep.model, deep.args)
    assert depgraph.Plan.load(graph, tmp_path / "small" / "plan.json").cost() == story.after


class _Flat(nn.Module):
    """Says much of what was pruned beside its few weights: every channel is 36 columns of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 32, 3), nn.Linear(32 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().flatten(1))  # type: ignore[no-any-return]


def test_what_a_file_says_of_what_went_counts_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = _Flat().eval(), torch.randn(2, 3, 8, 8)
    subject = Subject(model, (images,), {}, lambda other: float(other(images).norm()), Figure("norm"))
    most = int(_dense_bytes(subject, tmp_path) * 0.55)
    build(subject, Budget(bytes=most), tmp_path / "small", replace(QUICK, shares=(), rounds=3))
    assert 0.8 * most < file_bytes(tmp_path / "small" / "model.onnx") <= most


def test_what_fits_already_is_tried_once_in_a_precision(subject: Subject, tmp_path: Path) -> None:
    ways = replace(QUICK, recipes=("magnitude", "random"), shares=())
    assert len(build(subject, Budget(bytes=10**9), tmp_path / "same", ways).tried) == 1


@pytest.mark.ci
def test_the_best_precision_within_the_budget_is_taken(subject: Subject, tmp_path: Path) -> None:
    most = int(_dense_bytes(subject, tmp_path) * 0.45)
    ways = replace(QUICK, precisions=("float32", "int8-static"))
    built = build(subject, Budget(bytes=most), tmp_path / "small", ways)
    assert {one.precision for one in built.tried} == {"float32", "int8-static"}
    assert built.best.precision == "int8-static" and built.best.quality == min(one.quality for one in built.tried)
    made = FileModel(tmp_path / "small" / "model.onnx", subject.model)(*subject.args)
    with torch.no_grad():
        assert float((made - built.best.model(*subject.args)).norm() / made.norm()) < 0.15


def test_a_full_disk_is_no_budget_that_nothing_meets(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from exporters.building import sources

    def full(*_: Any, **__: Any) -> None:
        raise ExportError("no room for model.onnx") from OSError("disk full")

    monkeypatch.setattr(sources, "to_onnx", full)
    with pytest.raises(ExportError, match="no room"):
        build(subject, Budget(bytes=10_000), tmp_path / "small", QUICK)
    assert not os.listdir(tmp_path)


def test_a_quality_that_is_not_the_files_is_not_said_to_be(subject: Subject, tmp_path: Path) -> None:
    def only_modules(model: nn.Module) -> float:
        if isinstance(model, FileModel):
            raise RuntimeError("it wants weights to look at")
        return subject.measure(model)

    ways = replace(QUICK, precisions=("int8-static",), shares=(), probes=0)
    built = build(replace(subject, measure=only_modules), Budget(bytes=10**9), tmp_path / "same", ways)
    assert not built.best.of_file and built.best.quality == 0
    assert built.story.quality[0].data == subject.figure.data
    assert any("quality is that of the float32 model, as the int8-static file" in note for note in built.story.notes)
    both = replace(ways, precisions=("float32", "int8-static"))
    again = build(replace(subject, measure=only_modules), Budget(bytes=10**9), tmp_path / "both", both)
    first, second = again.tried  # the other takes fewer bytes, but its quality isn't known
    assert first.precision == "float32" and second.bytes < first.bytes and second.quality == first.quality


def test_a_folder_that_is_there_stays(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists and isn't empty"):
        build(subject, Budget(bytes=10**9), tmp_path / "there", QUICK)
    assert os.listdir(tmp_path / "there") == ["mine"]


def test_budgets_are_positive() -> None:
    for given in ({}, {"latency_ms": 0.0}, {"bytes": -1}, {"latency_ms": float("nan")}, {"bytes_share": 1.0}):
        with pytest.raises(TargetError, match=r"a budget (needs a limit|of .* is none)"):
            Budget(**given)  # type: ignore[arg-type]


def test_a_budget_of_shares_is_one_of_numbers_once_the_dense_model_is_measured() -> None:
    assert Budget(latency_share=0.5, bytes_share=0.25, threads=2).of(8.0, 1000) == Budget(4.0, 250, 2)
    assert Budget(latency_ms=3).of(8.0, 1000) == Budget(latency_ms=3)
    with pytest.raises(TargetError, match="bytes and bytes_share limits one thing twice"):
        Budget(bytes=10, bytes_share=0.5)


def test_other_numbers_than_float32_are_refused(subject: Subject, tmp_path: Path) -> None:
    other = replace(subject, model=_network().bfloat16())
    with pytest.raises(ExportError, match="weights in bfloat16.*float32: give model.float()"):
        build(other, Budget(bytes=10**9), tmp_path / "small", QUICK)


def test_limits_go_by_what_a_precision_was_measured_to_save() -> None:
    limits = Limits.of(Budget(latency_ms=10, bytes=1000), Precision("int8-static", rest=200, rate=0.25, share=0.5))
    assert limits == Limits(weights=3200, milliseconds=20)
    tighter = limits.tighter(2.0, None)
    assert tighter.weights == 3200 and tighter.milliseconds is not None and 9.8 < tighter.milliseconds < 10
    assert limits.tighter(0.9, 3000) == Limits(weights=3000, milliseconds=20)


def test_another_round_goes_by_what_the_file_took_beside_its_weights() -> None:
    precision = Precision("int8-dynamic", rest=200, rate=0.25)
    fewer = precision.fewer_weights(1000, found=1300, weights=3200)  # 500 bytes beside the weights, not 200
    assert 1800 < fewer < 2000
    assert precision.fewer_weights(1000, found=1001, weights=3200) < 3200
    assert precision.fewer_weights(100, found=1300, weights=3200) == 2


def test_a_file_in_the_place_of_a_model_takes_and_gives_the_same(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
            return {"logits": self.linear(x) * scale, "scaled": x * scale}

    model, given = Two().eval(), {"x": torch.randn(2, 4), "scale": torch.ones(2, 4) * 3}
    to_onnx(model, (), tmp_path / "two.onnx", given)
    file = FileModel(tmp_path / "two.onnx", model)
    made = file(**given, labels=torch.zeros(2))
    torch.testing.assert_close(made.logits, model(**given)["logits"].detach())
    torch.testing.assert_close(made["scaled"], made[1])
    assert not list(file.parameters())


@pytest.mark.slow
def test_a_language_model_comes_with_what_generates(tmp_path: Path) -> None:
    from depgraph.cli import main

    root = Path(__file__).parents[2]
    text = tmp_path / "text.txt"
    text.write_text("\n".join((root / "examples" / f"{n}.py").read_text() for n in ("demo", "digits", "cnn")) * 4)
    code = main(
        [
            "build",
            str(root / "examples/assets/tiny-llama"),
            "--data",
            str(text),
            "--size",
            "7MB",
            "--out",
            str(tmp_path / "b"),
        ]
        + ["--recipes", "magnitude", "--batches", "2"]
    )
    assert code == 0
    story = json.loads((tmp_path / "b" / "report.json").read_text())
    assert story["after"]["params"] < story["before"]["params"]
    assert sum(f.stat().st_size for f in (tmp_path / "b").glob("model.onnx*")) <= 7_000_000
    done = subprocess.run(
        [sys.executable, tmp_path / "b" / "run.py", "def main(", "8"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("def main(") and "tokens a second" in done.stdout
