"""Device profiles and the latency model made of them: what they find, refuse and predict. No time is asserted."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

import depgraph
import exporters
import importance
from depgraph.errors import ExportError, ProfileError, TargetError
from exporters.timing import measure
from exporters.timing.kit import skeleton
from exporters.timing.model import _Known
from exporters.timing.narrow import halved, through
from exporters.timing.operators import Operators
from exporters.timing.tables import Alone, Grid, Stairs

INPUTS = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1, groups=48),
        nn.SiLU(),
        nn.Conv2d(48, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.GELU(),
        nn.Linear(32, 5),
    ).eval()


@pytest.fixture(scope="module")
def graph() -> depgraph.DependencyGraph:
    return depgraph.trace(cnn(), INPUTS)


@pytest.fixture(scope="module")
def file(graph: depgraph.DependencyGraph) -> Any:
    return exporters.onnx_graph(graph)


@pytest.fixture(scope="module")
def kit(file: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporters.write_kit(file, tmp_path_factory.mktemp("kit") / "kit")


@pytest.fixture(scope="module")
def measured(kit: Path) -> Iterator[dict[str, Any]]:
    """The profile that the kit's script writes in a Python that can import nothing but onnxruntime and numpy."""
    guard = (
        "import sys, runpy\n"
        "class Guard:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] not in {*sys.stdlib_module_names, 'numpy', 'onnxruntime'}:\n"
        "            raise ImportError(f'{name} is not on the device')\n"
        "sys.meta_path.insert(0, Guard())\n"
        "sys.argv = ['measure.py', '--runs', '2']\n"
        "runpy.run_path('measure.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", guard], cwd=kit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield json.loads((kit / "profile.json").read_text())


def exact(measured: dict[str, Any]) -> dict[str, Any]:
    """The profile with made-up times: blocks of 16 channels, 1 us for a block in and out, and 100 us for anything else."""
    made = copy.deepcopy(measured)
    del made["narrow"]
    for key, entry in made["micro"].items():
        block = 1 if key.startswith("matmul") else 16
        for k, (a, b) in enumerate(entry["points"]):
            wide = 1 if "alone" in key or key.startswith("depthwise") else math.ceil(a / block)
            entry["ms"][k] = 0.001 * wide * math.ceil(b / block) * (2 if a % 4 and not key.startswith("matmul") else 1)
    for node in made["dense"]["nodes"]:
        node["ms"] = 0.1 * node["often"]
    made["dense"]["ms"] = sum(node["ms"] for node in made["dense"]["nodes"])
    return made


def test_the_kit_measures_with_nothing_but_onnxruntime_and_numpy(measured: dict[str, Any], file: Any) -> None:
    profile = exporters.Profile.of(measured)
    profile.check_fits(file)
    profile.check_here()
    assert profile.dense_ms > 0
    assert profile.machine["threads"] == 1
    assert profile.machine["onnxruntime"] == onnxruntime.__version__
    assert {"cpu", "instructions", "os"} <= profile.machine.keys()
    assert all(ms > 0 for entry in measured["micro"].values() for ms in entry["ms"])


def test_a_kit_is_small_and_says_nothing_of_the_weights(kit: Path) -> None:
    assert sum(path.stat().st_size for path in kit.iterdir()) < 400_000
    assert np.float32(0.1).tobytes() not in b"".join(path.read_bytes() for path in kit.glob("micro*.onnx"))


def test_products_of_one_input_stay_apart_without_their_weights(tmp_path: Path) -> None:
    """ONNX Runtime computes only once what equal tensors make of one input, and all large tensors of a kit are made up."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(96, 96, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.query(x) * self.key(x)) @ self.value(x).transpose(-1, -2)

    x = torch.randn(1, 4, 96)
    made = exporters.onnx_graph(depgraph.trace(Apart().eval(), x))
    onnx_ir.save(skeleton(made.model), tmp_path / "made.onnx")
    (ran,) = measure.profiled([(tmp_path / "made.onnx", {n: np.asarray(a) for n, a in made.inputs.items()})], 1, 1)
    assert sum(node["op"] in ("MatMul", "Gemm") and node["shape"][-1] == 96 for node in ran) == 3


def test_profiles_come_back_as_they_were(measured: dict[str, Any], tmp_path: Path) -> None:
    profile = exporters.Profile.of(measured)
    profile.save(tmp_path / "p.json")
    assert exporters.Profile.load(tmp_path / "p.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_every_measured_operator_is_found_in_the_model(measured: dict[str, Any], graph: Any, file: Any) -> None:
    latency = exporters.MeasuredLatency(graph, file, exporters.Profile.of(measured))
    kept = graph.widths.at({})
    assert latency.ms(kept) == pytest.approx(measured["dense"]["ms"])
    assert sum(latency.parts(kept).values()) == pytest.approx(latency.ms(kept))
    assert not latency.notes
    kinds = sorted(signature.kind for signature in Operators(file).signatures)
    assert kinds == ["conv", "conv", "depthwise", "matmul"]


def test_time_follows_whole_blocks(measured: dict[str, Any], graph: Any, file: Any) -> None:
    latency = exporters.MeasuredLatency(graph, file, exporters.Profile.of(exact(measured)))
    first = graph.axes[0]
    assert first.size == 48

    def at(left: int) -> float:
        return latency.ms(graph.widths.at({first.name: range(left, 48)}))

    assert at(44) == pytest.approx(at(36), rel=0.05)
    assert at(32) < 0.9 * at(36)
    assert at(47) > at(48), "an odd number of channels goes a slower way"


def test_a_plan_by_time_keeps_whole_blocks(measured: dict[str, Any], graph: Any, file: Any) -> None:
    latency = exporters.MeasuredLatency(graph, file, exporters.Profile.of(exact(measured)))
    limit = 0.7 * latency.ms(graph.widths.at({}))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(latency_ms=limit, latency=latency))
    assert latency.ms(plan.kept()) <= limit
    model = plan.apply()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.out_channels % 16 == 0 for conv in convs)


def test_a_file_and_its_module_agree(measured: dict[str, Any], graph: Any, file: Any) -> None:
    """The plan of a module leaves of the ONNX file what the plan of the file itself does."""
    profile = exporters.Profile.of(exact(measured))
    by_module, by_file = exporters.MeasuredLatency(graph, file, profile), exporters.MeasuredLatency(file, file, profile)
    for axis, other in zip(graph.axes, file.axes, strict=True):
        gone = range(axis.size // 3)
        assert by_module.ms(graph.widths.at({axis.name: gone})) == pytest.approx(
            by_file.ms(file.widths.at({other.name: gone}))
        )


def test_predicted_and_measured_stand_side_by_side(
    measured: dict[str, Any], graph: Any, file: Any, tmp_path: Path
) -> None:
    latency = exporters.MeasuredLatency(graph, file, exporters.Profile.of(measured))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5))
    exporters.to_onnx(plan.apply(), INPUTS, tmp_path / "small.onnx")
    found = exporters.predicted_and_measured(latency, plan, tmp_path / "small.onnx", rounds=2)
    assert found.dense_ms > 0
    assert found.predicted == pytest.approx(latency.ms(plan.kept()) / measured["dense"]["ms"])
    assert found.error == pytest.approx(found.predicted / found.measured - 1)
    with pytest.raises(ExportError, match="can't load"):
        exporters.predicted_and_measured(latency, plan, tmp_path / "none.onnx", rounds=2)


def test_another_graph_is_refused(measured: dict[str, Any], graph: Any, file: Any) -> None:
    latency = exporters.MeasuredLatency(graph, file, exporters.Profile.of(measured))
    again = depgraph.trace(cnn(), INPUTS)
    with pytest.raises(TargetError, match="another graph"):
        again.plan(importance.Magnitude(), depgraph.Target(latency_ms=1, latency=latency))


def test_another_model_machine_or_version_is_refused(measured: dict[str, Any], graph: Any, file: Any) -> None:
    other = {**measured, "fingerprint": "0"}
    with pytest.raises(ProfileError, match="one model on one size"):
        exporters.MeasuredLatency(graph, file, exporters.Profile.of(other))
    for name, value, match in (
        ("cpu", "Another CPU", "was measured on Another"),
        ("onnxruntime", "0.1", "onnxruntime 0.1"),
    ):
        elsewhere = exporters.Profile.of({**measured, "machine": {**measured["machine"], name: value}})
        latency = exporters.MeasuredLatency(graph, file, elsewhere)
        plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5))
        with pytest.raises(ProfileError, match=match):
            exporters.predicted_and_measured(latency, plan, "small.onnx")


def test_a_device_without_avx_is_warned_of(measured: dict[str, Any]) -> None:
    for instructions in ([], ["NEON"]):
        plain = exporters.Profile.of({**measured, "machine": {**measured["machine"], "instructions": instructions}})
        assert any("no AVX" in said and "isn't known: these times show" in said for said in plain.warnings)
    known = exporters.Profile.of({**measured, "machine": {**measured["machine"], "instructions": ["AVX2"]}})
    assert known.warnings == ()


@pytest.mark.parametrize(
    "damage", [{"format": 99}, {"dense": {}}, {"micro": None}, {"machine": {}}, {"dense": {"ms": -1, "nodes": []}}]
)
def test_a_damaged_profile_is_refused(measured: dict[str, Any], damage: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="profile|format"):
        exporters.Profile.of({**measured, **damage})


def test_what_a_file_lacks_to_be_a_profile_is_named() -> None:
    with pytest.raises(ProfileError, match="no profile: its 'dense' is missing; make it again"):
        exporters.Profile.of({"weights": 1})


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("{")
    (tmp_path / "list").write_text("[]")
    for name in ("text", "list", "none"):
        with pytest.raises(ProfileError):
            exporters.Profile.load(tmp_path / name)


def test_a_kit_goes_into_a_new_folder(file: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ExportError, match="isn't empty"):
        exporters.write_kit(file, tmp_path)


def probe(step: int, align: int, slow: float) -> dict[int, float]:
    sizes = (*range(2, 16, 2), *range(16, 33, 4), *range(33, 65), *range(68, 97, 4))
    return {c: (0.01 + 0.002 * -(-c // step)) * (1 if c % align == 0 else slow) for c in sizes}


@pytest.mark.parametrize(("step", "align"), [(16, 4), (16, 1), (8, 4), (8, 1), (32, 4)])
def test_the_staircase_is_found(step: int, align: int) -> None:
    found = Stairs.of(probe(step, align, 1.4))
    assert (found.step, found.align) == (step, align)


def test_a_line_is_no_staircase() -> None:
    assert Stairs.of({c: 0.01 + 0.001 * c for c in probe(1, 1, 1)}) == Stairs()


def test_grids_are_interpolated_on_their_stairs() -> None:
    stairs = Stairs(16, 4)
    points = [(a, b) for a in (16, 64) for b in (32, 64)]
    grid = Grid.of([*points, (63, 64)], [*(a * b / 1000 for a, b in points), 9.0], 1, (stairs, Stairs(16)))
    assert grid.ms(64, 64) == pytest.approx(4.096)
    assert grid.ms(36, 33) == grid.ms(48, 48) == pytest.approx(48 * 48 / 1000)
    assert grid.ms(63, 64) == pytest.approx(9.0)
    alone = Alone({16: 1.0, 64: 4.0}, stairs, {15: 5.0, 63: 20.0})
    assert alone.ms(36, 36) == pytest.approx(3.0)
    assert alone.ms(39, 39) == pytest.approx(12.5)


def test_less_than_a_block_in_is_what_was_measured_there() -> None:
    """Eight channels in go another way than sixteen, and may take longer."""
    on, beside = [(16, 64), (32, 64)], [(4, 64), (8, 64), (15, 64), (31, 64)]
    grid = Grid.of([*on, *beside], [1.0, 2.0, 0.6, 1.2, 2.0, 3.0], 4, (Stairs(16, 4, {8: 0.5, 16: 1.0}), Stairs(16)))
    assert grid.ms(8, 64) == pytest.approx(1.2)
    assert grid.ms(6, 64) == pytest.approx(0.9)
    assert grid.ms(31, 64) == pytest.approx(3.0)
    assert grid.ms(20, 64) == pytest.approx(2.0)


def test_fewer_blocks_never_seem_slower_than_more() -> None:
    grid = Grid.of([(16, 64), (32, 64), (64, 64)], [1.0, 9.0, 3.0], 0, (Stairs(16), Stairs(16)))
    assert grid.ms(32, 64) == pytest.approx(3.0)
    assert Alone.of({16: 1.0, 32: 9.0, 64: 3.0}, {}, Stairs(16)).ms(32, 32) == pytest.approx(3.0)


def test_a_size_within_a_block_never_seems_faster_than_the_block() -> None:
    stairs = Stairs(16, 4)
    grid = Grid.of([(16, 64), (32, 64), (64, 64), (63, 64)], [1.0, 2.0, 4.0, 3.2], 1, (stairs, Stairs(16)))
    assert grid.ms(63, 64) == grid.ms(62, 64) == pytest.approx(4.0)
    assert Alone.of({16: 1.0, 32: 2.0, 64: 4.0}, {15: 0.9, 63: 3.2}, stairs).ms(63, 63) == pytest.approx(4.0)


def test_what_other_programs_took_of_a_long_operator_is_not_its_time(
    measured: dict[str, Any], graph: Any, file: Any
) -> None:
    made = exact(measured)
    for node in made["dense"]["nodes"]:
        node["ms"] = 0.01
    slow = next(node for node in made["dense"]["nodes"] if node["op"] == "Conv")
    calm = exporters.MeasuredLatency(graph, file, exporters.Profile.of(made)).parts(graph.widths.at({}))
    slow["ms"] = 20.0
    found = exporters.MeasuredLatency(graph, file, exporters.Profile.of(made)).parts(graph.widths.at({}))
    assert max(found.values()) < 3 * max(calm.values())
    assert sum(found.values()) == pytest.approx(made["dense"]["ms"])


def test_long_operators_are_measured_by_themselves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = depgraph.trace(
        nn.Sequential(nn.Linear(256, 640), nn.ReLU(), nn.Linear(640, 4)).eval(), torch.randn(128, 256)
    )
    kit = exporters.write_kit(exporters.onnx_graph(wide), tmp_path / "kit")
    entries = [entry for entry in json.loads((kit / "kit.json").read_text())["micro"] if entry["alone"]]
    assert [entry["points"][k] for entry in entries for k in entry["alone"]], "128 x 256 x 640 is more than 20 million"
    for entry in entries:
        found = measure.micro(kit / entry["file"], entry, 1, 1)
        assert len(found["ms"]) == len(entry["points"])
        assert min(found["ms"]) > 0


def test_the_machine_says_what_it_is() -> None:
    found = measure.machine(2)
    assert found["threads"] == 2
    assert found["cpu"]
    assert set(found["instructions"]) <= {"AVX", "AVX2", "AVX-512", "NEON"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(24), nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


def test_a_block_that_is_left_out_takes_no_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), *[Residual() for _ in range(3)], nn.Linear(24, 4)).eval()
    graph = depgraph.trace(model, torch.randn(5, 8))
    measured = exporters.MeasuredLatency.of(graph, runs=2)
    data = copy.deepcopy(dict(measured.profile.data))
    data["dense"]["ms"] = 2 * sum(node["ms"] for node in data["dense"]["nodes"])  # half of it between operators
    latency = exporters.MeasuredLatency(graph, measured.file, exporters.Profile(data))
    whole, block = graph.widths.at({}), graph.blocks[1]
    every, left = latency.parts(whole), latency.parts(whole.without([block.name]))
    assert sum(left.values()) == pytest.approx(latency.ms(whole.without([block.name])))
    products = [name for name in every if "MatMul" in name or "Gemm" in name]
    assert len(products) == 8 and sum(name in left for name in products) == 6
    assert left["between operators"] < every["between operators"]
    assert all(left[name] == every[name] for name in left if name != "between operators")
    both = latency.ms(whole.without([block.name, graph.blocks[0].name]))
    assert both < latency.ms(whole.without([block.name])) < latency.ms(whole)
    same = exporters.MeasuredLatency(latency.file, latency.file, latency.profile)
    branch = latency.file.branches[1].name
    assert same.ms(latency.file.widths.at({}).without([branch])) == pytest.approx(
        latency.ms(whole.without([block.name]))
    )


def test_an_operator_without_a_table_goes_through_its_time_at_half_of_the_widths(
    measured: dict[str, Any], file: Any
) -> None:
    made = exact(measured)
    made["narrow"] = copy.deepcopy(measured["narrow"])
    dense = {(n["name"], n["op"]): n for n in made["dense"]["nodes"]}
    shared = [n for n in made["narrow"]["nodes"] if (n["name"], n["op"]) in dense]
    assert len(shared) == len(dense) == len(made["narrow"]["nodes"]), "the narrow model has the same operators"
    for node in shared:
        node["ms"] = 0.08 * node["often"]
    plain, fitted = (
        exporters.MeasuredLatency(file, file, exporters.Profile.of({**made, "narrow": narrow}))
        for narrow in ({"nodes": []}, made["narrow"])
    )
    whole, half = file.widths.at({}), halved(file)
    before, after = ({k: v / one.parts(whole)[k] for k, v in one.parts(half).items()} for one in (plain, fitted))
    counted = [name for name in after if after[name] != pytest.approx(before[name])]
    assert counted and all(after[name] == pytest.approx(0.8) for name in counted)
    assert fitted.ms(whole) == pytest.approx(plain.ms(whole))


def test_the_line_through_measured_times_never_falls() -> None:
    line = through([(0.0, 0.2), (4.0, 0.5), (8.0, 0.4)])
    assert [line(size) for size in (0, 2, 4, 6, 8, 12)] == pytest.approx([0.2, 0.35, 0.5, 0.5, 0.5, 0.5])


def test_a_fused_operator_is_told_by_its_shape_in_the_narrow_model(tmp_path: Path) -> None:
    class Same(nn.Module):
        """Two axes of one width, of which one can't be narrowed."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.gelu(self.up(x)))

    found = exporters.onnx_graph(depgraph.trace(Same().eval(), torch.randn(4, 32)))
    half = halved(found).class_sizes()
    operators, node = Operators(found), {"name": "BiasGelu", "op": "BiasGelu", "shape": [4, 32]}
    assert len(operators.like((4, 32))) > 1
    (run,) = _Known({}, {("BiasGelu", "BiasGelu"): {"ms": 1.0, "shape": [4, 16]}}, half).like(operators, node).runs
    assert [int(half[number]) for number in run] == [4, 16]


def test_long_operators_are_measured_beside_the_largest_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine gets slower by and by: each lot takes 1.5 times what the one before it took."""
    models = {f"n{k}": np.zeros(size, dtype=np.uint8) for k, size in enumerate([10, 30, 20, 40])}
    slower, lots = [1.0], list[list[int]]()

    def times(these: list[bytes]) -> list[float]:
        lots.append([len(one) for one in these])
        slower.append(slower[-1] * 1.5)
        return [len(one) * slower[-2] for one in these]

    monkeypatch.setattr(measure, "TOGETHER", 80)
    found = dict(measure.long_ones(models, [0, 1, 2, 3], times))
    assert lots == [[10, 20, 40], [30, 40]]
    assert found == {k: pytest.approx(len(models[f"n{k}"])) for k in range(4)}
    assert dict(measure.long_ones(models, [1], times)) == {1: pytest.approx(30 * slower[-2])}
