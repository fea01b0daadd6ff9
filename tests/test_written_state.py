"""Forwards that write to what the model holds: nothing of a run stays, in the original or in the pruned model."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from tests.test_end_to_end import zeroed


def _assign(model: Any) -> None:
    model.teacher.weight.data = model.teacher.weight.data * 0.9 + model.student.weight.data * 0.1


def _copy_data(model: Any) -> None:
    model.teacher.weight.data.copy_(model.teacher.weight.data * 0.9 + model.student.weight.data * 0.1)


def _multiply(model: Any) -> None:
    model.teacher.weight.data.mul_(0.9).add_(model.student.weight.data, alpha=0.1)


def _lerp(model: Any) -> None:
    model.teacher.weight.lerp_(model.student.weight, 0.1)


def _mask(model: Any) -> None:
    model.teacher.weight.data *= model.teacher.weight.data.abs() > 0.1


def _renorm(model: Any) -> None:
    model.student.weight.data = torch.renorm(model.student.weight.data, 2, 0, 0.5)


def _count(model: Any) -> None:
    model.seen.data += 1


def _count_in_a_view(model: Any) -> None:
    model.seen[:1] += 1


def _replace(model: Any) -> None:
    model.seen = model.seen + 1


WRITES: list[Callable[[Any], None]] = [
    _assign, _copy_data, _multiply, _lerp, _mask, _renorm, _count, _count_in_a_view, _replace,
]  # fmt: skip


class Averaged(nn.Module):
    """Two branches, of which one follows the other."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        super().__init__()
        self.student, self.teacher, self.head = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(2))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self)
        return self.head(torch.relu(self.student(x)) + torch.relu(self.teacher(x))) + self.seen.sum()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__.strip("_"))
def test_nothing_of_a_run_stays_and_the_pruned_model_goes_on_like_the_original(write: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    model, x = Averaged(write).eval(), torch.randn(4, 6)
    before, clean = _state(model), copy.deepcopy(model)
    plan = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    pruned = plan.apply(form="module")
    torch.testing.assert_close(_state(model), before, rtol=0, atol=0)
    kept = plan.kept()
    for name, tensor in pruned.state_dict().items():
        value = next(v for v in plan.graph.capture.program.values.values() if v.target == name)
        stays = [kept.of(value, d) for d in range(tensor.ndim)]
        expected = before[name]
        for d, indices in enumerate(stays):
            expected = expected if indices is None else expected.index_select(d, torch.from_numpy(indices))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    reference = zeroed(clean, plan)
    for _ in range(3):
        torch.testing.assert_close(pruned(x), reference(x), rtol=1e-4, atol=1e-5)


def test_a_cut_in_place_keeps_the_weights_too() -> None:
    model, x = Averaged(_assign).eval(), torch.randn(4, 6)
    bias = model.teacher.bias.detach().clone()
    depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_()
    assert model.student.out_features < 16
    assert set(model.teacher.bias.tolist()) <= set(bias.tolist())


def test_a_forward_that_fails_half_way_changes_nothing() -> None:
    class Failing(Averaged):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("there is something wrong here")

    for write in WRITES:
        model = Failing(write).eval()
        before = _state(model)
        with pytest.raises(depgraph.errors.CaptureError):
            depgraph.trace(model, (torch.randn(4, 6),))
        torch.testing.assert_close(_state(model), before, rtol=0, atol=0)


def test_a_graph_form_goes_on_with_what_a_parameter_is_given() -> None:
    torch.manual_seed(0)
    model, x = Averaged(_assign).eval(), torch.randn(4, 6)
    clean = copy.deepcopy(model)
    plan = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    pruned, reference = plan.apply(form="graph"), zeroed(clean, plan)
    for _ in range(3):
        torch.testing.assert_close(pruned(x), reference(x), rtol=1e-4, atol=1e-5)


class Adding(nn.Module):
    """Leaves what it computes by the way in what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        batch["hidden"] = torch.relu(self.body(batch["x"]))
        batch["list"].append(1)
        return self.head(batch["hidden"])


def test_what_is_given_as_an_example_stays_as_it_was() -> None:
    batch = {"x": torch.randn(4, 6), "list": []}
    depgraph.trace(Adding().eval(), (batch,)).plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply()
    assert list(batch) == ["x", "list"] and batch["list"] == []


@functools.lru_cache
def _table(length: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length).float()
    return angles.cos(), angles.sin()


_TABLES: dict[int, Tensor] = {}


class Cached(nn.Module):
    """Keeps tables where no one can put back what was there: with a function, in a module of Python, in a class."""

    made: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in _TABLES:
            _TABLES[x.shape[1]] = torch.linspace(0, 1, x.shape[1])
        if Cached.made is None:
            Cached.made = torch.ones(6) * 2
        cos, sin = _table(x.shape[1])
        return self.head(torch.relu(self.body(x * cos + sin + _TABLES[x.shape[1]] * Cached.made)))


def test_tables_that_the_code_keeps_elsewhere_have_their_data() -> None:
    torch.manual_seed(0)
    model, x = Cached().eval(), torch.randn(4, 6)
    plan = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    kept = [*_table(6), _TABLES[6], Cached.made]
    got, pruned = model(x), plan.apply()(x)
    _table.cache_clear()
    _TABLES.clear()
    Cached.made = None
    torch.testing.assert_close(got, model(x))
    torch.testing.assert_close(pruned, zeroed(model, plan)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept, [*_table(6), _TABLES[6], Cached.made])


class Remembering(nn.Module):
    """Leaves behind what it computed, with its gradients, and a mean that is a buffer; `lock` can't be copied."""

    def __init__(self, lock: Any = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.register_buffer("mean", torch.zeros(16))
        self.seen: list[Tensor] = []
        self.lock = lock

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.seen = [hidden]
        made = self.second(hidden)
        if self.training:
            self.mean = 0.9 * self.mean + made.mean(0)
        return x + made - self.mean


def _deep(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), *[Remembering(**options) for _ in range(3)], nn.Linear(16, 4))


def test_what_a_forward_leaves_behind_with_its_gradients_is_no_hindrance() -> None:
    model, x = _deep(), torch.randn(4, 6)
    model(x).sum().backward()  # training
    graph = depgraph.trace(model.eval(), (x,))
    narrower = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report(form="module")
    shorter = graph.cut_plan(branches=["2"]).apply_with_report(form="module")
    for report in (narrower, shorter):
        assert report.check.error < 1e-5
        report.model(x).sum().backward()
    assert model[1].seen[0].grad_fn is not None  # type: ignore[index]


def test_a_model_that_can_not_be_copied_says_so_whatever_goes() -> None:
    graph = depgraph.trace(_deep(lock=threading.Lock()).eval(), (torch.randn(4, 6),))
    for plan in (graph.cut_plan(branches=["2"]), graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))):
        with pytest.raises(depgraph.errors.CutError, match=r"can't be copied .* use plan.apply_\(\) to cut in place"):
            plan.apply(form="module")
    assert len(graph.cut_plan(branches=["2"]).apply_()) == 4  # type: ignore[arg-type]
