"""Which input sizes a graph form takes: as many as torch.export leaves open, and a note for each that it is fixed to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import importance
from depgraph.cutting.involved import Involved, none_involved
from depgraph.cutting.program import cut_programs
from depgraph.cutting.report import CutReport
from depgraph.cutting.varying import fixed_sizes
from depgraph.errors import CaptureError


class Picture(nn.Module):
    """Pools what it sees, so that any height and width will do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().flatten(2).mean(-1))


class Repeated(nn.Module):
    """Repeats a table for each example of the batch and for all features that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)
        self.register_buffer("table", torch.rand(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden * self.table.repeat(x.shape[0], 1, 16))


class Unrolled(nn.Module):
    """Takes a sequence of any length, one step after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.GRUCell(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.step.hidden_size)
        for t in range(x.shape[1]):
            state = self.step(x[:, t] * scale[:, t], state)
        return self.head(state)


class Windowed(nn.Module):
    """Pads to whole windows and halves what it has, many times, each time with windows of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(4, 4, 3, padding=1) for _ in range(8)])
        self.up, self.head = nn.Conv1d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for k, layer in enumerate(self.layers):
            window = 3 + k
            x = F.pad(x, (0, (-x.shape[-1]) % window))
            x = layer(x)[..., : 1 + x.shape[-1] * 5 // 6]
        return self.head(x.mean(-1))


def as_graph(model: nn.Module, *args: Tensor) -> CutReport:
    graph = depgraph.trace(model.eval(), args)
    return graph.plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_with_report(form="graph")


def test_sizes_that_grow_too_involved_stay_what_they_are() -> None:
    """Torch reasons for minutes about such formulas; the batch stays open."""
    model, x = Windowed().eval(), torch.randn(2, 3, 64)
    with pytest.raises(Involved, match="gives a tensor of size"), none_involved(model):
        torch.export.export(model, (x,), dynamic_shapes=({2: torch.export.Dim.AUTO},), strict=False)
    report = as_graph(model, x)
    assert report.model(torch.randn(5, 3, 64)).shape == (5, 2)
    assert any("takes only size 64 of dimension 2 of input 'x'" in note for note in report.notes)


def test_a_graph_form_takes_pictures_of_other_sizes() -> None:
    report = as_graph(Picture(), torch.rand(2, 3, 16, 16))
    assert report.notes == ()
    assert report.model(torch.rand(3, 3, 24, 12)).shape == (3, 5)


class Handing(nn.Module):
    """Hands all that it is given on, as wrappers for averages and adapters do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_a_graph_form_of_a_wrapper_takes_other_sizes_too() -> None:
    picture = torch.rand(2, 3, 16, 16)
    wrapper = Handing(Picture().eval())
    graph = depgraph.trace(wrapper, kwargs={"x": picture})
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6)).apply_with_report(form="graph")
    assert report.notes == () and "forward" not in vars(wrapper)
    assert report.model(x=torch.rand(3, 3, 24, 12)).shape == (3, 5)
    again = depgraph.trace(Handing(report.model), kwargs={"x": picture})
    twice = again.plan(importance.Magnitude(), depgraph.Target(params=0.8)).apply_with_report()
    assert twice.model(x=torch.rand(3, 3, 24, 12)).shape == (3, 5)


def test_a_repeat_for_each_example_follows_the_batch() -> None:
    report = as_graph(Repeated(), torch.rand(2, 7, 6))
    x = torch.rand(5, 9, 6)
    assert report.model(x).shape == (5, 9, 4)
    assert report.notes == ()
    torch.testing.assert_close(report.model(x)[:2], report.model(x[:2]))


def test_a_length_that_the_graph_form_needs_and_the_model_does_not_is_noted() -> None:
    report = as_graph(Unrolled(), torch.rand(2, 7, 6), torch.rand(2, 7, 1))
    (note,) = report.notes
    assert "takes only size 7 of dimension 1 of input 'x'" in note
    assert report.model(torch.rand(3, 7, 6), torch.rand(3, 7, 1)).shape == (3, 4)


class Placed(nn.Module):
    """Multiplies by the rows of a table that belong to the places, which ties the length to that of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 3)
        self.register_buffer("table", torch.rand(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.table[: x.shape[1]].view(1, x.shape[1], 1))


def test_a_length_that_the_capture_finds_out_to_be_one_number_is_noted() -> None:
    report = as_graph(Placed(), torch.rand(2, 7, 5))
    with pytest.raises(CaptureError, match="takes only size 7 of dimension 1"):
        report.model(torch.rand(2, 9, 5))
    (note,) = report.notes
    assert "takes only size 7 of dimension 1 of input 'x'" in note


@pytest.mark.parametrize("wrong", [lambda y: y[:2], lambda y: y / y.shape[0]], ids=["rows", "values"])
def test_a_batch_that_a_number_in_the_graph_came_from_is_noted(wrong: object) -> None:
    class Baked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return wrong(way.model(x))  # type: ignore[operator]

    graph = depgraph.trace(Picture().eval(), (torch.rand(2, 3, 16, 16),))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6))
    way = next(cut_programs(plan))
    assert fixed_sizes(graph, way.model, way.inputs) == ()
    (note,) = fixed_sizes(graph, Baked(), way.inputs)
    assert "size 2 of dimension 0 of input 'x'" in note


class Halves(nn.Module):
    """Its windows are as long as half of the sequence, which torch.export takes for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu().unflatten(2, (4, 4)).flatten(2)
        length = x.shape[1] // 2
        return self.second(hidden.unfold(1, length, length).mean(-1).mean(1))


def test_a_graph_form_refuses_sizes_at_which_it_would_compute_something_else() -> None:
    report = as_graph(Halves(), torch.randn(2, 6, 6))
    assert any("takes only size 6 of dimension 1 of input 'x'" in note for note in report.notes)
    report.model(torch.randn(5, 6, 6))
    with pytest.raises(CaptureError, match="takes only size 6 of dimension 1 of 'x', not 9"):
        report.model(torch.randn(2, 9, 6))


def test_a_model_without_data_has_a_graph_form() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(4, 8)
    report = depgraph.trace(model.eval(), (x,)).cut_plan({"0.weight:0": [0, 1]}).apply_with_report(form="graph")
    assert report.notes == () and report.model(torch.randn(7, 8, device="meta")).shape == (7, 4)


class Folds(nn.Module):
    """Refuses to run before it is ready, and folds what it was given by the number of samples: others would run, and be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(True))
        self.body, self.head = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            raise RuntimeError("not ready")
        hidden = torch.relu(self.body(x))
        return self.head(hidden.reshape(x.shape[0], -1, hidden.shape[-1]).mean(1))


def test_a_graph_form_that_was_captured_at_one_size_refuses_others() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 5, 8)
    graph = depgraph.trace(Folds().eval(), example)
    report = graph.plan(importance.Random(seed=0), depgraph.Target(params=0.9)).apply_with_report(form="graph")
    assert report.model(example).shape == (2, 4) and any("fixed to the example" in note for note in report.notes)
    with pytest.raises(AssertionError, match="only size 2 of dimension 0 of 'x'"):
        report.model(torch.randn(4, 5, 8))
    again = depgraph.trace(report.model, example).plan(importance.Random(seed=0), depgraph.Target(params=0.95)).apply()
    assert again(example).shape == (2, 4)
    with pytest.raises((AssertionError, CaptureError), match="only size 5"):
        again(torch.randn(2, 4, 8))
