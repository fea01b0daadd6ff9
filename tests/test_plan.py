"""Targets, scopes, rounding, protection; plans as data."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.errors import CheckError, CheckpointError, NothingToPrune, PlanError, ScoreError, TargetError
from depgraph.finite import require_finite
from tests.test_end_to_end import random_scores
from tests.zoo import ZOO

Graph = depgraph.DependencyGraph


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture
def graph() -> Graph:
    return depgraph.trace(mlp(), torch.randn(2, 8))


@pytest.fixture(scope="module")
def llama() -> Graph:
    example = ZOO["llama_8_4"]()
    return depgraph.trace(example.model, example.args, example.kwargs)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.2, math.nan, True, "half"])
def test_a_target_is_a_share_between_0_and_1(share: object) -> None:
    with pytest.raises(TargetError, match="params"):
        depgraph.Target(params=share)  # type: ignore[arg-type]


def test_a_target_names_something() -> None:
    with pytest.raises(TargetError, match="at least one"):
        depgraph.Target()


@pytest.mark.parametrize("share", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_a_share_may_be_any_real_number(share: Any) -> None:
    assert depgraph.Target(params=share) == depgraph.Target(params=0.5)


@pytest.mark.parametrize("metric", ["params", "macs", "bytes"])
def test_the_target_is_met_within_one_group(graph: Graph, metric: str) -> None:
    plan = graph.plan(random_scores(graph), depgraph.Target(**{metric: 0.6}))
    dense, left = getattr(graph.dense_cost, metric), getattr(plan.cost(), metric)
    assert left <= 0.6 * dense
    widest = max(dense - getattr(graph.cost({axis.name: [0]}), metric) for axis in graph.axes)
    assert left > 0.6 * dense - widest


def test_several_targets_hold_at_once(graph: Graph) -> None:
    share = graph.plan(random_scores(graph), depgraph.Target(params=0.9, macs=0.5)).cost().share_of(graph.dense_cost)
    assert share["macs"] <= 0.5


def test_the_lowest_scores_go(graph: Graph) -> None:
    scores = {axis.name: np.arange(axis.size)[::-1].astype(float) for axis in graph.axes}
    plan = graph.plan(scores, depgraph.Target(params=0.6), scope="axis")
    for name, groups in plan.removal.items():
        assert groups == tuple(range(graph[name].size - len(groups), graph[name].size))


def test_uniform_keeps_equal_widths_in_all_layers(llama: Graph) -> None:
    plan = llama.plan(random_scores(llama), depgraph.Target(params=0.8), scope="uniform")
    widths: dict[str, set[int]] = {}
    for name, groups in plan.removal.items():
        widths.setdefault(llama[name].kind, set()).add(len(groups))
    assert plan.removal
    assert all(len(w) == 1 for w in widths.values())


@pytest.mark.parametrize("scope", ["global", "axis"])
def test_rounding_keeps_multiples(graph: Graph, scope: str) -> None:
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.6), scope=scope, round_to=8)
    assert all((graph[n].size - len(g)) % 8 == 0 for n, g in plan.removal.items())


def test_rounding_to_the_size_of_an_axis_leaves_it_whole_and_smaller_ones_are_noted(graph: Graph) -> None:
    first, second = graph.axes
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.9), round_to=48, only=second)
    assert list(plan.removal) == [second.name]
    assert plan.notes == ("axis '2.weight:0' has fewer than 48 groups, so round_to=48 doesn't hold there",)
    with pytest.raises(NothingToPrune):
        graph.plan(random_scores(graph), depgraph.Target(params=0.9), round_to=48, only=first)
    assert graph.plan(random_scores(graph), depgraph.Target(params=0.56), round_to=8).notes == ()


def test_floors_and_the_least_that_can_be_reached(graph: Graph) -> None:
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.6), floor=0.5)
    assert all(graph[n].size - len(g) >= graph[n].size / 2 for n, g in plan.removal.items())
    with pytest.raises(TargetError, match=r"params=0\.\d+ at the least"):
        graph.plan(random_scores(graph), depgraph.Target(params=0.1), floor=0.9)


def test_protect_and_only(graph: Graph) -> None:
    first, second = graph.axes
    target, scores = depgraph.Target(params=0.8), random_scores(graph)
    for pattern in (first.name, "0.*", first, lambda axis: axis.name == first.name):
        assert list(graph.plan(scores, target, protect=pattern).removal) == [second.name]
        assert list(graph.plan(scores, target, only=pattern).removal) == [first.name]
    with pytest.raises(NothingToPrune, match="protect"):
        graph.plan(scores, target, protect=[first, second])


@pytest.mark.parametrize("option", ["protect", "only"])
def test_patterns_that_name_no_axis_are_slips(graph: Graph, option: str) -> None:
    scores, other = (
        random_scores(graph),
        depgraph.trace(nn.Sequential(nn.Identity(), *mlp()), torch.randn(2, 8)).axes[0],
    )
    for pattern, name in (("nothing.*", "nothing.*"), (["0.*", "0"], "0"), (other, other.name)):
        with pytest.raises(PlanError, match=re.escape(f"{option}={name!r} names no axis")):
            graph.plan(scores, depgraph.Target(params=0.8), **{option: pattern})
    for wrong in (3, [3]):
        with pytest.raises(PlanError, match="3 names no axis: protect and only take"):
            graph.plan(scores, depgraph.Target(params=0.8), **{option: wrong})


def test_unknown_options_are_refused(graph: Graph) -> None:
    with pytest.raises(PlanError, match="no option 'scop'"):
        graph.plan(random_scores(graph), depgraph.Target(params=0.8), scop="axis")
    with pytest.raises(PlanError, match="scope='layer' is not one of"):
        graph.plan(random_scores(graph), depgraph.Target(params=0.8), scope="layer")


def test_scores_must_fit(graph: Graph) -> None:
    target, scores = depgraph.Target(params=0.8), random_scores(graph)
    first = graph.axes[0].name
    with pytest.raises(ScoreError, match="no scores for axis"):
        graph.plan({k: v for k, v in scores.items() if k != first}, target)
    with pytest.raises(ScoreError, match="48 groups"):
        graph.plan({**scores, first: np.ones(3)}, target)
    with pytest.raises(ScoreError, match="is nan"):
        graph.plan({**scores, first: np.full(48, np.nan)}, target)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (["low"] * 48, "aren't an array of real numbers"),
        (np.ones(48) * 1j, r"aren't an array of real numbers \(they are complex128\)"),
        ([[1], [1, 2]], "aren't an array of real numbers"),
        (None, "aren't an array of real numbers"),
    ],
)
def test_scores_are_real_numbers(graph: Graph, scores: object, says: str) -> None:
    first = graph.axes[0].name
    with pytest.raises(ScoreError, match=f"the scores of axis '{first}' {says}"):
        graph.plan({**random_scores(graph), first: scores}, depgraph.Target(params=0.8))


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ("magnitude", r"'magnitude' is a name, not a scorer: pass importance\.named\('magnitude'\)"),
        (None, "None is not a scorer"),
        (importance.Random, "is not a scorer: pass one such as"),
        (lambda graph: None, "gave a NoneType: it must return a dict"),
        (lambda graph: [1.0], "gave a list: it must return a dict"),
    ],
)
def test_what_is_no_scorer_is_refused(graph: Graph, scorer: Any, says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        graph.plan(scorer, depgraph.Target(params=0.8))


def test_scores_may_be_tensors(graph: Graph) -> None:
    scores, target = random_scores(graph), depgraph.Target(params=0.8)
    tensors = {name: nn.Parameter(torch.from_numpy(array)) for name, array in scores.items()}
    assert graph.plan(tensors, target).removal == graph.plan(scores, target).removal


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_whatever_the_score_reads(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].bias[5] = value
    graph = depgraph.trace(model, torch.randn(2, 8))
    says = r"parameter '2\.bias' holds NaN or infinite values: repair or reload the weights"
    with pytest.raises(ScoreError, match=says):
        graph.plan(importance.Random(), depgraph.Target(params=0.8))
    plan = graph.cut_plan({graph.axes[0].name: [3]})
    for apply in (plan.apply, plan.apply_):
        with pytest.raises(CheckError, match=says):
            apply()


def test_a_mask_may_be_infinite_but_not_nan() -> None:
    model = nn.BatchNorm1d(4)
    model.running_mean[1] = -math.inf
    require_finite(model, ScoreError)
    model.running_mean[2] = math.inf
    require_finite(model, ScoreError)
    model.running_mean[3] = math.nan
    with pytest.raises(ScoreError, match="buffer 'running_mean' holds NaN: repair"):
        require_finite(model, ScoreError)


def test_large_half_precision_weights_are_finite_though_their_sum_is_not() -> None:
    model = nn.Linear(64, 64).half()
    with torch.no_grad():
        model.weight.fill_(6e4)
    require_finite(model, ScoreError)
    require_finite(model.to("meta"), ScoreError)


def test_a_module_without_axes_is_refused() -> None:
    graph = depgraph.trace(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(NothingToPrune, match="Linear has no axis"):
        graph.plan({}, depgraph.Target(params=0.5))


@pytest.mark.parametrize("groups", [[1.5], [True], ["1"], 1.7, "12"])
def test_groups_are_whole_numbers(graph: Graph, groups: Any) -> None:
    name = graph.axes[0].name
    data = graph.cut_plan({name: [1]}).to_json()
    data["axes"][name]["removed"] = groups
    for make in (
        lambda: graph.cut_plan({}).with_axis(name, groups),
        lambda: depgraph.Plan.from_json(graph, data),
        lambda: graph.cut_plan({name: groups}),
    ):
        with pytest.raises(PlanError, match=f"axis '{name}'.*counted from 0"):
            make()


@pytest.mark.parametrize("version", [99, 0, "1", None])
def test_plans_of_another_format_are_refused(graph: Graph, version: Any) -> None:
    data = {**graph.cut_plan({}).to_json(), "format": version}
    with pytest.raises(PlanError, match=f"the plan has format {version!r} and this depgraph reads 1"):
        depgraph.Plan.from_json(graph, data)


def test_plans_are_checked(graph: Graph) -> None:
    name = graph.axes[0].name
    with pytest.raises(PlanError, match="no axis 'nothing'"):
        graph.cut_plan({"nothing": [0]})
    with pytest.raises(PlanError, match="groups 0 to 47"):
        graph.cut_plan({name: [48]})
    with pytest.raises(PlanError, match="at least one must stay"):
        graph.cut_plan({name: range(48)})
    bloom = ZOO["bloom"]()
    fixed = depgraph.trace(bloom.model, bloom.args, bloom.kwargs)
    axis = next(a for a in fixed.axes if a.reasons)
    with pytest.raises(PlanError, match="can't go"):
        fixed.cut_plan({axis.name: [next(iter(axis.reasons))]})


def test_plans_are_edited_merged_saved_and_loaded(graph: Graph, tmp_path: Path) -> None:
    first, second = (axis.name for axis in graph.axes)
    plan = graph.cut_plan({first: [1, 2], second: [0]})
    assert plan.without(first).removal == {second: (0,)}
    assert plan.with_axis(first, [5]).removal == {first: (5,), second: (0,)}
    assert (plan.without(first) | graph.cut_plan({second: [3]})).removal == {second: (0, 3)}
    plan.save(tmp_path / "plan.json")
    assert depgraph.Plan.load(graph, tmp_path / "plan.json").removal == plan.removal
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(PlanError, match="not a saved plan"):
        depgraph.Plan.load(graph, tmp_path / "bad.json")
    with pytest.raises(CheckpointError, match="can't be read"):
        depgraph.Plan.load(graph, tmp_path / "none.json")
    with pytest.raises(PlanError, match="with another plan, not with a NoneType"):
        plan.merge(None)  # type: ignore[arg-type]
    other = depgraph.trace(mlp(), torch.randn(2, 8))
    with pytest.raises(PlanError, match="two different graphs"):
        plan.merge(other.cut_plan({first: [0]}))


def test_removed_lists_parameter_dim_and_indices(graph: Graph) -> None:
    plan = graph.cut_plan({graph.axes[0].name: [3, 40]})
    found = {(r.target, r.dim): r.indices.tolist() for r in plan.removed()}
    assert found == {("0.weight", 0): [3, 40], ("0.bias", 0): [3, 40], ("2.weight", 1): [3, 40]}


def test_tied_axes_lose_equally_many(llama: Graph) -> None:
    rotary = next(a for a in llama.axes if any("inv_freq" in m.target for m in a.members))
    plan = llama.plan(random_scores(llama), depgraph.Target(params=0.97), only=rotary)
    values = [n for n in plan.removal if "v_proj" in n]
    assert len(values) == 2
    assert all(len(plan.removal[v]) == 2 * len(plan.removal[rotary.name]) for v in values)


class FirstBlockAlone(nn.Module):
    """Two blocks of three rows, which are two axes; `first` reads the first block only, and needs some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.first, self.all = nn.Linear(8, 6), nn.Linear(3, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.tanh(self.rows(x))
        return self.first(rows[:, :3]) + self.all(rows.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scope", ["global", "axis"])
def test_a_plan_never_empties_a_dim(scope: str, seed: int) -> None:
    graph = depgraph.trace(FirstBlockAlone().eval(), torch.randn(2, 8))
    assert sorted(axis.size for axis in graph.axes) == [2, 3]
    blocks = min(graph.axes, key=lambda axis: axis.size)
    with pytest.raises(PlanError, match="leaves nothing of 'first.weight'"):
        graph.cut_plan({blocks.name: [0]})
    with pytest.raises(TargetError) as refused:
        graph.plan(random_scores(graph, seed), depgraph.Target(params=0.001), scope=scope)
    least = float(str(refused.value).split("params=")[-1].split(" ")[0])
    report = graph.plan(
        random_scores(graph, seed), depgraph.Target(params=least + 0.002), scope=scope
    ).apply_with_report()
    assert all(0 not in p.shape for p in report.model.parameters())


def test_the_same_scores_give_the_same_plan(llama: Graph) -> None:
    example = ZOO["llama_8_4"]()
    again = depgraph.trace(example.model, example.args, example.kwargs)
    for scope in ("global", "axis", "uniform"):
        target = depgraph.Target(params=0.8)
        one, two = (g.plan(random_scores(g), target, scope=scope) for g in (llama, again))
        assert one.to_json() == two.to_json()
    flat = {axis.name: np.zeros(axis.size) for axis in llama.axes}
    assert llama.plan(flat, target).to_json() == again.plan(flat, target).to_json()


def test_scores_that_add_up_are_ranked_by_what_a_group_costs(graph: Graph) -> None:
    """A group of the first axis costs 8 + 1 + 32, one of the second 48 + 1 + 4."""

    class Summed:
        additive = True

        def __init__(self, second: float) -> None:
            self.second = second

        def __call__(self, graph: Graph, /) -> dict[str, np.ndarray]:
            return {graph.axes[0].name: np.ones(48), graph.axes[1].name: np.full(32, self.second)}

    first, second = (axis.name for axis in graph.axes)
    assert [graph.dense_cost.params - graph.cost({n: [0]}).params for n in (first, second)] == [41, 53]
    target = depgraph.Target(params=0.9)
    assert list(graph.plan(Summed(1.2), target).removal) == [second]
    assert list(graph.plan(Summed(1.4), target).removal) == [first]
    assert list(graph.plan(Summed(1.2), target, rank="score").removal) == [first]
    assert list(graph.plan(Summed(1.2)(graph), target).removal) == [first]
    assert list(graph.plan(Summed(1.2)(graph), target, rank="density").removal) == [second]


@pytest.mark.parametrize("order", [("params", "macs"), ("macs", "params")])
@pytest.mark.parametrize("loose", ["params", "macs"])
def test_a_limit_that_is_met_anyway_does_not_say_what_goes(order: tuple[str, str], loose: str) -> None:
    """Early channels have the multiplications, late ones the parameters: which are cheap depends on what binds."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(24, 200), nn.ReLU(), nn.Linear(200, 9))
    graph = depgraph.trace(model, torch.randn(1, 3, 16, 16))
    rng = np.random.default_rng(0)
    scores = {axis.name: np.sort(rng.random(axis.size)) + 0.1 for axis in graph.axes}
    (binding,) = {*order} - {loose}
    shares: dict[str, float] = {binding: 0.6, loose: 0.99}
    both = depgraph.Target(**{metric: shares[metric] for metric in order})
    alone = graph.plan(scores, depgraph.Target(**{binding: 0.6}), scope="global", rank="density")
    other = graph.plan(scores, depgraph.Target(**{loose: 0.6}), scope="global", rank="density")
    assert getattr(alone.cost(), loose) < 0.99 * getattr(graph.dense_cost, loose)
    assert {n: len(g) for n, g in alone.removal.items()} != {n: len(g) for n, g in other.removal.items()}
    assert graph.plan(scores, both, scope="global", rank="density").removal == alone.removal


def test_scores_that_do_not_compare_across_axes_take_the_same_share_of_each(graph: Graph) -> None:
    class Scored:
        """Scores of which the first axis's are all lower."""

        def __call__(self, graph: Graph, /) -> dict[str, np.ndarray]:
            return {axis.name: np.arange(axis.size) + 100.0 * k for k, axis in enumerate(graph.axes)}

    class OfTheAxis(Scored):
        comparable = False

    first, second = (axis.name for axis in graph.axes)
    target = depgraph.Target(params=0.6)
    assert list(graph.plan(Scored(), target).removal) == [first]
    assert list(graph.plan(Scored()(graph), target).removal) == [first]
    assert list(graph.plan(OfTheAxis(), target, scope="global").removal) == [first]
    alike = graph.plan(OfTheAxis(), target)
    assert alike.to_json() == graph.plan(Scored(), target, scope="axis").to_json()
    assert list(alike.removal) == [first, second]


@pytest.mark.parametrize(
    "option",
    [
        {"round_to": 0},
        {"round_to": 2.5},
        {"round_to": True},
        {"floor": -0.1},
        {"floor": "x"},
        {"floor": 2},
        {"form": "onnx"},
    ],
)
def test_options_out_of_range_are_refused(graph: Graph, option: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=next(iter(option))):
        graph.plan(random_scores(graph), depgraph.Target(params=0.8), **option)


def test_what_is_no_target_is_refused(graph: Graph) -> None:
    with pytest.raises(TargetError, match="expected a Target"):
        graph.plan(random_scores(graph), 0.7)  # type: ignore[arg-type]


def test_infinite_scores_are_refused_and_those_of_fixed_groups_do_not_matter(graph: Graph) -> None:
    scores = random_scores(graph)
    scores[graph.axes[1].name][3] = math.inf
    with pytest.raises(ScoreError, match="group 3 of axis '2.weight:0' is inf"):
        graph.plan(scores, depgraph.Target(params=0.8))


def test_a_model_without_multiplications_is_cut_by_nothing_to_meet_a_target_of_macs() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6))
    graph = depgraph.trace(model, torch.zeros(1, 3, dtype=torch.long), free=["output 0"])
    assert graph.dense_cost.macs == 0
    assert graph.plan(random_scores(graph), depgraph.Target(macs=0.5)).removal == {}


def test_a_plan_prints_its_costs_and_is_plain_json(graph: Graph) -> None:
    plan = graph.cut_plan({graph.axes[0].name: [3, 40]})
    assert "48 -> 46" in str(plan)
    data = plan.to_json()
    assert data["axes"] == {"0.weight:0": {"groups": 48, "removed": [3, 40]}}
    data["axes"]["0.weight:0"]["groups"] = 47
    with pytest.raises(PlanError, match="made for 47 groups"):
        depgraph.Plan.from_json(graph, data)


def test_a_plan_on_a_full_or_missing_folder_leaves_nothing(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be written"):
        graph.cut_plan({}).save(tmp_path / "missing" / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_plan_on_a_read_only_disk_says_so(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for method in ("write_text", "unlink"):
        monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(CheckpointError, match="can't be written: Read-only file system"):
        graph.cut_plan({}).save(tmp_path / "plan.json")


@pytest.mark.parametrize("config", [5, None, {"hidden_size": 2.5}, {"hidden_size": "8"}])
def test_a_plan_with_a_config_that_is_none_is_refused(graph: Graph, config: object) -> None:
    with pytest.raises(PlanError, match="not a saved plan"):
        depgraph.Plan.from_json(graph, graph.cut_plan({}).to_json() | {"config": config})


def test_names_of_nothing_and_other_slips_in_an_edited_plan_are_said(graph: Graph) -> None:
    first = graph.axes[0]
    plan = graph.cut_plan({first.name: [1]})
    with pytest.raises(PlanError, match="'zz' is no branch or block"):
        plan.without("zz")
    with pytest.raises(PlanError, match=r"\['zz'\] is no name of a branch"):
        plan.with_branches(["zz"])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="by the name of an axis"):
        graph.cut_plan([1])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="by the name of their axis, a str, not by Axis"):
        graph.cut_plan({first: [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"floor": 1}, "floor leaves no group"),
        ({"protect": "*", "round_to": 8}, "protect and round_to together leave no group"),
        ({"round_to": "gguf-k"}, "round_to leaves no group"),
    ],
)
def test_options_that_leave_nothing_are_named(graph: Graph, options: dict[str, Any], says: str) -> None:
    with pytest.raises(NothingToPrune, match=says):
        graph.plan(random_scores(graph), depgraph.Target(params=0.8), **options)


def test_a_target_that_the_dense_model_meets_says_that_nothing_goes(graph: Graph) -> None:
    plan = graph.plan(random_scores(graph), depgraph.Target(bytes=10**9))
    assert plan.removal == {}
    assert plan.notes == ("the model keeps within the target as it is, so that nothing goes",)
    assert str(plan.apply_with_report().check) == "nothing was removed: error 0.0e+00 of the largest output"


def test_whole_numbers_of_numpy_round_too(graph: Graph) -> None:
    target = depgraph.Target(params=0.6)
    plans = [graph.plan(random_scores(graph), target, round_to=step) for step in (np.int64(8), 8)]
    assert plans[0].removal == plans[1].removal


class _Attending(nn.Module):
    """Heads, their width and the stream are tied to one another in the module's Python; neurons aren't."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.before(x)
        x = x + self.attend(seen, seen, seen, need_weights=False)[0]
        return x + self.mlp(self.between(x))


def test_axes_beside_those_asked_for_go_only_with_one_of_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), *[_Attending() for _ in range(3)], nn.Linear(32, 4)).eval()
    graph = depgraph.trace(model, torch.randn(2, 5, 6))
    heads = [f"{k}.attend.in_proj_weight:0/within" for k in (1, 2, 3)]
    wanted = [*heads, *(f"{k}.mlp.0.weight:0" for k in (1, 2, 3))]
    for share in (0.6, 0.4):
        plan = graph.plan(importance.Magnitude(), depgraph.Target(params=share), scope="axis", only=wanted)
        assert plan.removal.keys() <= set(wanted) or plan.removal.keys() & set(heads)


@pytest.mark.parametrize("scope", ["global", "axis"])
def test_a_group_that_takes_far_more_than_is_asked_for_stays_where_others_come_nearer(scope: str) -> None:
    """One of the two units in the middle takes a sixth of all parameters."""
    graph = depgraph.trace(
        nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 300), nn.Linear(300, 3)), torch.randn(4, 6)
    )
    scores = {"0.weight:0": np.array([0.0, 1.0]), "2.weight:0": np.arange(300) + 2.0}
    for share in (0.95, 0.5):
        plan = graph.plan(scores, depgraph.Target(params=share), scope=scope)
        assert share - 0.01 < plan.cost().params / graph.dense_cost.params <= share
    assert "0.weight:0" in graph.plan(scores, depgraph.Target(params=0.83), scope="global").removal


def test_axes_that_hardly_stay_while_the_model_does_are_said() -> None:
    model = nn.Sequential(
        nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 3)
    )
    graph = depgraph.trace(model, torch.randn(2, 4))
    names = [axis.name for axis in graph.axes]
    scores = {name: np.arange(graph[name].size) + (100.0 if k else 0.0) for k, name in enumerate(names)}
    plan = graph.plan(scores, depgraph.Target(params=0.62))
    assert plan.notes == (
        f"1 of 3 axes keep less than a tenth of their groups, {names[0]!r} 1 of 40: floor=0.1 keeps a tenth of each",
    )
    assert graph.plan(scores, depgraph.Target(params=0.62), floor=0.1).notes == ()
    assert graph.plan(scores, depgraph.Target(params=0.3)).notes == ()


def encoder(width: int, heads: int, neurons: int) -> Graph:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, heads, neurons, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(16, width), stack, nn.Linear(width, 10))
    return depgraph.trace(model.eval(), torch.randn(2, 6, 16))


@pytest.mark.parametrize("scope", ["global", "axis"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_a_width_that_is_tied_to_heads_goes_no_further_than_what_is_asked_for(scope: str, share: float) -> None:
    """A quarter of 48 dimensions, with two of 8 heads everywhere, is the smallest step of the module, and a third of it."""
    graph = encoder(48, 8, 96)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=share), scope=scope, form="module")
    assert share - 0.03 < plan.cost().params / graph.dense_cost.params <= share and not plan.notes
    report = plan.apply_with_report()
    assert report.form == "module" and report.check.error < 1e-4


def test_a_plan_that_ends_far_below_its_target_says_why() -> None:
    graph = encoder(48, 8, 96)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.9), form="module", only="0.weight:0")
    assert "0.weight:0" in plan.removal
    assert plan.notes == (
        "66.3% of params stay where 90.0% may: the smallest step, 12 of the 48 groups of axis '0.weight:0' and groups of 2 more axes, "
        "is 33.7%",
    )
