"""Targets in milliseconds and bytes, with latency models that are exact functions of the widths: nothing here is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph.dependency import DependencyGraph
from depgraph.errors import NothingToPrune, TargetError
from depgraph.stairs import stops
from depgraph.widths import Kept


@dataclass
class Synthetic:
    """Milliseconds of each axis by the number of its groups that stay, and a constant."""

    graph: DependencyGraph
    of: Mapping[str, Callable[[int], float]]
    constant: float = 0.0
    asked: list[int] = field(default_factory=list)

    def parts(self, kept: Kept, /) -> Mapping[str, float]:
        left = {name: self._left(kept, name) for name in self.of}
        return {"constant": self.constant, **{name: self.of[name](n) for name, n in left.items()}}

    def ms(self, kept: Kept, /) -> float:
        self.asked.append(1)
        return sum(self.parts(kept).values())

    def _left(self, kept: Kept, name: str) -> int:
        gone = kept.masks.get(name)
        return self.graph[name].size - (0 if gone is None else int(gone.sum()))


def staircase(step: int, ms: float = 1.0) -> Callable[[int], float]:
    return lambda n: ms * math.ceil(n / step)


@pytest.fixture(scope="module")
def graph() -> DependencyGraph:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    return depgraph.trace(model.eval(), torch.randn(1, 3, 8, 8))


def scores(graph: DependencyGraph, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {axis.name: generator.random(axis.size) for axis in graph.axes}


def left(plan: depgraph.Plan) -> list[int]:
    return [axis.size - len(plan.removal.get(axis.name, ())) for axis in plan.graph.axes]


def timed(model: Any, ms: float, **more: Any) -> depgraph.Target:
    return depgraph.Target(latency_ms=ms, latency=model, **more)


@pytest.mark.parametrize("scope", ["global", "axis", "uniform"])
@pytest.mark.parametrize("step", [8, 16, 24])
def test_whole_steps_go_and_the_limit_is_met(graph: DependencyGraph, scope: str, step: int) -> None:
    first, second = graph.axes
    model = Synthetic(graph, {first.name: staircase(step), second.name: staircase(step)})
    dense = model.ms(graph.widths.at({}))
    for seed, share in enumerate((0.8, 0.6, 0.4)):
        plan = graph.plan(scores(graph, seed), timed(model, share * dense), scope=scope)
        assert model.ms(plan.kept()) <= share * dense < model.ms(plan.kept()) + 2
        assert all(n % step == 0 or n == axis.size for n, axis in zip(left(plan), graph.axes, strict=True))


def test_a_width_that_is_slower_is_passed_over(graph: DependencyGraph) -> None:
    """Where all but multiples of 4 take twice as long and multiples of 4 are in proportion, only these are left."""
    names = [axis.name for axis in graph.axes]
    model = Synthetic(graph, dict.fromkeys(names, lambda n: n * (1.0 if n % 4 == 0 else 2.0)))
    plan = graph.plan(scores(graph), timed(model, 100), scope="global")
    assert model.ms(plan.kept()) <= 100
    assert all(n % 4 == 0 for n in left(plan))
    assert sum(left(plan)) == 100


def test_an_axis_in_proportion_is_cut_to_the_group(graph: DependencyGraph) -> None:
    model = Synthetic(graph, {axis.name: float for axis in graph.axes})
    plan = graph.plan(scores(graph), timed(model, 111), scope="global")
    assert model.ms(plan.kept()) == 111


def test_what_takes_no_time_stays(graph: DependencyGraph) -> None:
    first, second = graph.axes
    model = Synthetic(graph, {first.name: staircase(16)}, constant=3.0)
    plan = graph.plan(scores(graph), timed(model, 5), scope="axis")
    assert left(plan) == [32, second.size]
    with pytest.raises(NothingToPrune, match="takes any time"):
        graph.plan(scores(graph), timed(model, 5), only=second)


@pytest.mark.parametrize(("share", "apart"), [(0.7, True), (0.3, False)])
def test_turns_favour_the_dear_axis_but_not_in_a_deep_cut(graph: DependencyGraph, share: float, apart: bool) -> None:
    """Below a third of the time all axes lose the same share; above half, what is dear for its parameters loses more."""
    first, second = graph.axes
    model = Synthetic(graph, {first.name: lambda n: 10.0 * n, second.name: lambda n: 0.1 * n})
    plan = graph.plan(scores(graph), timed(model, share * model.ms(graph.widths.at({}))), scope="axis")
    lost = [1 - n / axis.size for n, axis in zip(left(plan), graph.axes, strict=True)]
    assert (lost[0] > lost[1] + 0.05) == apart
    assert abs(lost[0] - lost[1]) < (0.2 if apart else 0.03)


def test_by_density_the_dear_axis_goes_first(graph: DependencyGraph) -> None:
    first, second = graph.axes
    model = Synthetic(graph, {first.name: staircase(16, 10.0), second.name: staircase(16, 1.0)})
    equal = {axis.name: np.ones(axis.size) for axis in graph.axes}
    plan = graph.plan(equal, timed(model, 26), scope="global", rank="density")
    assert left(plan) == [32 - 16, second.size] or left(plan) == [32, second.size]
    assert model.ms(plan.kept()) <= 26


def test_several_limits_hold_at_once(graph: DependencyGraph) -> None:
    model = Synthetic(graph, {axis.name: staircase(16) for axis in graph.axes})
    target = timed(model, 8, params=0.3, bytes=100_000)
    plan = graph.plan(scores(graph), target, scope="axis")
    assert model.ms(plan.kept()) <= 8
    assert plan.cost().params <= 0.3 * graph.dense_cost.params
    assert plan.cost().bytes <= 100_000


def test_bytes_may_be_a_number(graph: DependencyGraph) -> None:
    target = depgraph.Target(bytes=150_000)
    plan = graph.plan(scores(graph), target)
    one_group = graph.dense_cost.bytes - graph.cost({graph.axes[0].name: [0]}).bytes
    assert 150_000 - one_group < plan.cost().bytes <= 150_000
    assert target.met_by(plan.cost(), graph.dense_cost)
    assert str(target) == "bytes=150,000"


def test_a_limit_that_is_met_takes_nothing(graph: DependencyGraph) -> None:
    model = Synthetic(graph, {axis.name: staircase(16) for axis in graph.axes})
    assert graph.plan(scores(graph), timed(model, 1000)).removal == {}
    assert graph.plan(scores(graph), depgraph.Target(bytes=10**9)).removal == {}


def test_what_cannot_be_met_says_the_least_and_what_holds_it(graph: DependencyGraph) -> None:
    first, second = graph.axes
    model = Synthetic(graph, {first.name: staircase(16), second.name: lambda n: 7.0 + n / 96}, constant=1.0)
    with pytest.raises(
        TargetError, match=r"latency=9\.01 ms at the least; what remains is held by .*2\.weight:0 7\.01 ms"
    ):
        graph.plan(scores(graph), timed(model, 2))
    with pytest.raises(TargetError, match=r"bytes=[\d,]+ at the least; what remains is held by .* B"):
        graph.plan(scores(graph), depgraph.Target(bytes=100))


def test_round_to_and_floors_hold_beside_steps(graph: DependencyGraph) -> None:
    model = Synthetic(graph, {axis.name: staircase(16) for axis in graph.axes})
    plan = graph.plan(scores(graph), timed(model, 6), round_to=24, floor=0.3)
    assert all(n % 24 == 0 or n == axis.size for n, axis in zip(left(plan), graph.axes, strict=True))
    assert all(n >= 0.3 * axis.size for n, axis in zip(left(plan), graph.axes, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {"latency_ms": 5},
        {"latency": object()},
        {"latency_ms": 0, "latency": object()},
        {"latency_ms": math.inf, "latency": object()},
        {"latency_ms": "fast", "latency": object()},
    ],
)
def test_milliseconds_need_a_model_and_a_number(given: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="latency"):
        depgraph.Target(**given)


def test_steps_take_bytes_and_milliseconds(graph: DependencyGraph) -> None:
    schedule = importance.Schedule(steps=2)
    done = schedule.apply(graph, importance.Magnitude(), depgraph.Target(bytes=150_000))
    assert done.steps[-1].cost.bytes <= 150_000
    model = Synthetic(graph, {axis.name: staircase(16) for axis in graph.axes})
    done = schedule.apply(graph, importance.Magnitude(), timed(model, 5))
    assert len(done.steps) == 2
    assert model.ms(done.plan.kept()) <= 5 < model.ms(graph.widths.at({}))


def test_steps_leave_a_limit_that_is_met_as_it_is(graph: DependencyGraph) -> None:
    nothing = Synthetic(graph, {})
    assert not nothing.ms(graph.widths.at({}))
    done = importance.Schedule(steps=2).apply(graph, importance.Magnitude(), timed(nothing, 5))
    assert done.steps[-1].cost.params > 0.9 * graph.dense_cost.params


def test_a_cut_to_milliseconds_is_right(graph: DependencyGraph) -> None:
    model = Synthetic(graph, {axis.name: staircase(16) for axis in graph.axes})
    report = graph.plan(importance.Magnitude(), timed(model, 5)).apply_with_report()
    assert report.check is not None and report.check.error < 1e-4
    assert report.model[0].out_channels % 16 == 0


@pytest.mark.parametrize("step", [1, 3, 16, 50, 128])
def test_stops_are_the_ends_of_steps(step: int) -> None:
    found = stops(lambda n: 1e-3 * (math.ceil(300 / step) - math.ceil((300 - n) / step)), range(1, 300))
    assert found == [n for n in range(1, 300) if (300 - n) % step == 0]


def test_between_steps_a_slight_slope_is_no_reason_to_stop() -> None:
    found = stops(lambda n: n * 1e-5 + 1e-2 * (n // 16), range(1, 200))
    assert found == [*range(16, 200, 16), 199]


def test_where_nothing_is_saved_there_is_no_stop() -> None:
    assert stops(lambda n: 0.0, range(1, 50)) == []
    assert stops(lambda n: -n * 0.01, range(1, 50)) == []
