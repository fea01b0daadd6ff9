"""Forwards that write to what the model or its caller holds: nothing is changed by looking, and the pruned model writes alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import exporters
import importance
from depgraph.capture.keeping import unwritten
from depgraph.errors import CaptureError, CutError
from tests.test_end_to_end import zeroed

Write = Callable[[Any, Tensor], Any]


class Teacher(nn.Module):
    """A student, and a teacher of the same widths that `write` changes in every forward."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.student, self.teacher, self.head = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("mask", torch.rand(16, 6).gt(0.5).float())
        self.register_buffer("mean", torch.randn(16))
        self.register_buffer("variance", torch.ones(16))
        self.plain = torch.rand(16)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self, x)
        return self.head(torch.relu(self.student(x)) * self.plain + torch.relu(self.teacher(x)) + self.mean)


def _mixed(m: Any) -> Tensor:
    return m.teacher.weight.data * 0.9 + m.student.weight.data * 0.1


def _by_value(m: Any, x: Tensor) -> None:
    if bool(x.sum() > -1e9):
        m.teacher.weight.copy_(_mixed(m))


def _fill_numpy(m: Any, x: Tensor) -> None:
    m.teacher.weight.data.numpy()[:] *= 0.5


def _fail_half_way(m: Any, x: Tensor) -> None:
    m.teacher.weight.data.mul_(0.5)
    m.teacher.bias.data = m.teacher.bias.data * 2
    raise ValueError("half way")


WRITES: dict[str, Write] = {
    "data": lambda m, x: setattr(m.teacher.weight, "data", _mixed(m)),
    "data_copy": lambda m, x: m.teacher.weight.data.copy_(_mixed(m)),
    "data_in_place": lambda m, x: m.teacher.weight.data.mul_(0.9).add_(m.student.weight.data, alpha=0.1),
    "copy": lambda m, x: m.teacher.weight.copy_(_mixed(m)),
    "lerp": lambda m, x: m.teacher.weight.lerp_(m.student.weight, 0.1),
    "out": lambda m, x: torch.mul(m.teacher.weight, 0.5, out=m.teacher.weight.data),
    "view": lambda m, x: m.teacher.weight.data.t().mul_(0.5),
    "mask_data": lambda m, x: setattr(m.teacher.weight, "data", m.teacher.weight.data * m.mask),
    "mask": lambda m, x: m.teacher.weight.mul_(m.mask),
    "clamp": lambda m, x: m.teacher.weight.data.clamp_(-0.1, 0.1),
    "max_norm": lambda m, x: setattr(m.teacher.weight, "data", torch.renorm(m.teacher.weight.data, 2, 0, 0.3)),
    "buffer": lambda m, x: m.mean.mul_(0.5),
    "buffer_data": lambda m, x: setattr(m.mean, "data", m.mean.data + 1),
    "buffer_replaced": lambda m, x: setattr(m, "mean", m.mean * 0.5),
    "attribute": lambda m, x: m.plain.mul_(0.5),
    "by_settled_value": lambda m, x: m.mean.mul_(0.5) if float(torch.ones(2)[0]) else None,
    "replaced_by_settled_value": lambda m, x: setattr(m, "mean", m.mean * float(torch.ones(2)[0]) * 0.5),
}
MODULE_ONLY: dict[str, Write] = {
    "parameter_replaced": lambda m, x: setattr(m.teacher, "weight", nn.Parameter(m.teacher.weight * 0.5)),
    "by_value": _by_value,
    "statistics": lambda m, x: F.batch_norm(m.student(x), m.mean, m.variance, training=True),
}
REFUSED: dict[str, tuple[Write, str]] = {
    "numpy": (_fill_numpy, "test_writes.py.*other memory"),
    "storage": (lambda m, x: m.teacher.weight.untyped_storage().fill_(0), "test_writes.py.*other memory"),
    "shape": (lambda m, x: setattr(m.variance, "data", m.variance.data[:3]), "test_writes.py.*replaced"),
    "failing": (_fail_half_way, "half way"),
}


def holdings(model: Any) -> dict[str, tuple[int, int, Tensor]]:
    """Every tensor with its identity, where its memory is, and what it holds."""
    held = [*model.named_parameters(), *model.named_buffers(), ("plain", model.plain)]
    return {name: (id(tensor), tensor.data_ptr(), tensor.detach().clone()) for name, tensor in held}


def same(now: dict[str, tuple[int, int, Tensor]], before: dict[str, tuple[int, int, Tensor]]) -> bool:
    return now.keys() == before.keys() and all(
        now[name][:2] == before[name][:2] and torch.equal(now[name][2], before[name][2]) for name in before
    )


def sliced(plan: depgraph.Plan, name: str, tensor: Tensor) -> Tensor:
    for gone in plan.removed():
        if gone.target == name:
            stays = np.setdiff1d(np.arange(tensor.shape[gone.dim]), gone.indices)
            tensor = tensor.index_select(gone.dim, torch.from_numpy(stays))
    return tensor


def _check(write: Write, form: str) -> None:
    model, x = Teacher(write).eval(), torch.randn(4, 6)
    clean, before, example = copy.deepcopy(model), holdings(model), x.clone()
    graph = depgraph.trace(model, (x,))
    assert same(holdings(model), before)
    (wide,) = [axis.name for axis in graph.axes if axis.size == 16]
    plan = graph.cut_plan({wide: [1, 5, 7]})
    report = plan.apply_with_report(form=form)
    assert report.form == form
    assert same(holdings(model), before)
    assert torch.equal(x, example)
    original = dict([*clean.named_parameters(), *clean.named_buffers()])
    for name, tensor in [*report.model.named_parameters(), *report.model.named_buffers()]:
        if name in original:
            assert torch.equal(tensor, sliced(plan, name, original[name])), name
    reference = zeroed(clean, plan)
    for shift in range(3):
        torch.testing.assert_close(report.model(x + shift), reference(x + shift), rtol=1e-4, atol=1e-5)
    report.model(x).sum().backward()


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", WRITES)
def test_a_pruned_model_writes_as_the_zeroed_original_does(name: str, form: str) -> None:
    _check(WRITES[name], form)


@pytest.mark.parametrize("name", MODULE_ONLY)
def test_what_a_graph_cannot_write_is_cut_in_the_module(name: str) -> None:
    _check(MODULE_ONLY[name], "module")


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_leaves_the_tensors_as_they_were(name: str) -> None:
    write, message = REFUSED[name]
    model = Teacher(write).eval()
    before = holdings(model)
    with pytest.raises(CaptureError, match=message):
        depgraph.trace(model, (torch.randn(4, 6),))
    assert same(holdings(model), before)


def test_a_graph_that_cannot_replace_a_parameter_is_refused() -> None:
    graph = depgraph.trace(Teacher(MODULE_ONLY["parameter_replaced"]).eval(), (torch.randn(4, 6),))
    with pytest.raises(CutError, match=r"replaces teacher\.weight"):
        graph.cut_plan({graph.axes[0].name: [1]}).apply(form="graph")


@pytest.mark.parametrize(
    "write",
    [
        lambda m, x: torch._foreach_lerp_([m.teacher.bias], [m.student.bias], 0.1),
        lambda m, x: m.teacher.weight.set_(m.student.weight),
        lambda m, x: _fill_numpy(m, x),
        lambda m, x: m.teacher.weight.untyped_storage().fill_(1),
        lambda m, x: F.embedding(torch.tensor([1, 2]), m.teacher.weight, max_norm=0.1),
        lambda m, x: F.batch_norm(m.student(x), m.mean, m.variance, training=True),
        lambda m, x: m.plain[2:].zero_(),
        lambda m, x: x.add_(1),
    ],
)
def test_whatever_is_written_is_put_back(write: Write) -> None:
    model, x = Teacher(write).eval(), torch.randn(4, 6)
    before, example = holdings(model), x.clone()
    with torch.no_grad(), unwritten(model, x):
        write(model, x)
        assert not (same(holdings(model), before) and torch.equal(x, example))
    assert same(holdings(model), before)
    assert torch.equal(x, example)


def test_a_tensor_that_grew_has_its_shape_and_values_again() -> None:
    model = Teacher(WRITES["buffer"]).eval()
    before = model.mean.clone()
    with torch.no_grad(), unwritten(model):
        model.mean.unsqueeze_(0).resize_(40, 40).fill_(1)
    assert torch.equal(model.mean, before)


def test_only_what_is_written_is_copied() -> None:
    model = Teacher(WRITES["buffer"]).eval()
    with torch.no_grad(), unwritten(model) as written:
        model(torch.randn(4, 6))
        copies = [t for t in (*model.parameters(), *model.buffers(), model.plain) if written.own(t) is not t]
    assert len(copies) == 1 and copies[0] is model.mean


def test_code_that_compiles_itself_may_do_so_and_its_writes_are_put_back() -> None:
    def halved(weight: Tensor, x: Tensor) -> Tensor:
        weight.mul_(0.5)
        return x @ weight.T

    model, x = nn.Linear(6, 6), torch.randn(4, 6)
    before = model.weight.detach().clone()
    with torch.no_grad(), unwritten(model, x):
        torch.compile(halved, backend="eager", fullgraph=True)(model.weight, x)
        assert torch.equal(model.weight, before * 0.5)
    assert torch.equal(model.weight, before)


def test_scores_checkpoints_and_cuts_in_place_leave_no_write_behind(tmp_path: Any) -> None:
    model, x = Teacher(WRITES["data_in_place"]).eval(), torch.randn(4, 6)
    before, base = holdings(model), copy.deepcopy(model)
    graph = depgraph.trace(model, (x,))
    plan = graph.plan(importance.Taylor([(x,)], loss=lambda out, batch: out.sum()), depgraph.Target(params=0.6))
    assert same(holdings(model), before)
    plan.apply_()
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, sliced(plan, name, before[name][2]))
    depgraph.save(model, tmp_path / "small")
    again = depgraph.load(tmp_path / "small", model=base)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, dict(again.named_parameters())[name])


def test_a_mixed_axis_is_checked_where_a_parameter_is_written_to() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.norm.weight.data.mul_(0.5)
            self.a.weight.data.mul_(0.5)
            return self.b(self.norm(self.a(x)))

    graph = depgraph.trace(Normed().eval(), (torch.randn(4, 6),))
    plan = graph.cut_plan({axis.name: [2, 3] for axis in graph.axes if axis.size == 16})
    check = plan.apply_with_report(form="module").check
    assert check is not None and check.mixed_axes == 1


def test_containers_and_tensors_of_the_example_stay_as_they_were() -> None:
    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 24), nn.Linear(24, 3)

        def forward(self, given: dict[str, Any]) -> dict[str, Any]:
            given["x"].data += 1
            given["more"].append(torch.relu(self.a(given["x"])))
            given["y"] = self.b(given["more"][-1])
            return given

    x = torch.randn(4, 5)
    given: dict[str, Any] = {"x": x, "more": []}
    before = x.clone()
    graph = depgraph.trace(Filling().eval(), (given,))
    graph.cut_plan({axis.name: [2, 3] for axis in graph.axes if axis.size == 24}).apply(form="module")
    assert list(given) == ["x", "more"] and given["more"] == [] and given["x"] is x
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["data", "mask"])
def test_an_export_leaves_no_write_behind(name: str, tmp_path: Any) -> None:
    model = Teacher(WRITES[name]).eval()
    before = holdings(model)
    exporters.to_onnx(model, (torch.randn(4, 6),), tmp_path / "teacher.onnx")
    assert same(holdings(model), before)


RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze": lambda y: y.unsqueeze_(1),
    "squeeze": lambda y: y[:, None].squeeze_(1),
    "squeeze all": lambda y: y[:, None].squeeze_(),
    "t": lambda y: y.t_().t(),
    "transpose": lambda y: y.transpose_(0, 1).transpose(0, 1) + 1,
    "swapaxes": lambda y: y.swapaxes_(1, 0).mT,
}


class ReshapesInPlace(nn.Module):
    """Gives what two layers make another shape, in place, and uses it under its old name."""

    def __init__(self, reshape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.reshape = reshape

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        made = self.reshape(hidden)
        return self.last(made * 2)


@pytest.mark.parametrize("name", RESHAPED)
def test_tensors_that_get_another_shape_in_place_are_narrowed(name: str) -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(ReshapesInPlace(RESHAPED[name]).eval(), torch.randn(4, 6), strict=True)
    assert sorted(axis.size for axis in graph.axes if axis.prunable.all()) == [12, 12]
    for form in ("module", "graph"):
        check = graph.plan(importance.Random(0), depgraph.Target(params=0.5)).apply_with_report(form=form).check
        assert check.error < 1e-5 < check.sensitivity
