"""Models whose control flow or sizes depend on values: captured by the decisions of the example."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import CaptureError, CheckError, CutError
from tests.test_end_to_end import zeroed


class Detector(nn.Module):
    """A backbone, a head for scores and one for boxes; gives the best of what passes a threshold, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.scores, self.boxes = nn.Conv2d(24, 1, 1), nn.Conv2d(24, 4, 1)
        self.refine = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.body(image)
        scores, boxes = self.scores(features).flatten(), self.boxes(features)[0].flatten(1).T
        rows = features[0].flatten(1).T
        passed = torch.where(scores > scores.median())[0]
        best, order = scores[passed].sort(descending=True)
        chosen = passed[order[: max(1, int(passed.numel() * 0.5))]]
        if best.numel() and best[0].item() > 1e6:
            chosen = chosen[:1]
        picked = torch.masked_select(scores, scores > best.mean())
        return {"boxes": boxes[chosen] + self.refine(rows[chosen]), "scores": best, "picked": picked}


class Experts(nn.Module):
    """Each token goes to one expert: loops over those that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.router = nn.Linear(6, 12), nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(4))
        self.after = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        chosen, total = self.router(x).argmax(-1), torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens = torch.nonzero(chosen == number).squeeze(1)
            total.index_add_(0, tokens, self.experts[number](x[tokens]))
        return self.after(x + total)


class Masked(nn.Module):
    """Writes what each expert makes of its tokens where a mask says."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.router, self.after = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 5)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weights, chosen = self.router(x).softmax(-1).topk(1)
        made = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = (chosen == number).any(-1)
            if mask.any():
                made[mask] = expert(x[mask]) * weights[mask]
        return self.after(made)


def pruned(model: nn.Module, inputs: Tensor) -> tuple[depgraph.DependencyGraph, depgraph.CutReport]:
    graph = depgraph.trace(model, inputs)
    return graph, graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report()


@pytest.mark.parametrize("model", [Detector, Experts, Masked])
def test_what_depends_on_values_is_cut_checked_and_said(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, inputs = model().eval(), torch.randn(1, 3, 32, 32) if model is Detector else torch.randn(9, 6)
    graph, report = pruned(net, inputs)
    assert report.form == "module"
    assert report.check.error <= report.check.tolerance < report.check.sensitivity
    assert any("as the code depends on values at tests/test_decisions.py:" in note for note in report.notes)
    report.model(torch.randn(1, 3, 40, 40) if model is Detector else torch.randn(40, 6))


def test_experts_that_the_example_passed_by_are_cut_like_the_others() -> None:
    torch.manual_seed(0)
    net = Experts().eval()
    _, report = pruned(net, torch.randn(1, 6))  # one token: three experts have nothing to do
    for _ in range(4):
        report.model(torch.randn(50, 6))
    widths = {expert[2].out_features for expert in report.model.experts}
    assert widths == {report.model.before.out_features}
    assert report.model.before.out_features < 12


class Listing(nn.Module):
    """Takes a list and an array from values: numbers by which the first rows are scaled, and where to cut them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 16), nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        hidden = self.first(x)
        scales = self.gate(hidden).mean(0).tolist()
        ends = sizes.numpy().cumsum()
        return self.last(torch.cat([hidden[: ends[0]] * scales[0], hidden[ends[0] : ends[1]].relu() * scales[1]]))


def test_lists_and_arrays_are_decisions_too() -> None:
    torch.manual_seed(0)
    net, inputs = Listing().eval(), (torch.randn(7, 6), torch.tensor([3, 4]))
    graph = depgraph.trace(net, inputs)
    assert "tests/test_decisions.py:" in graph.note
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report()
    assert report.check.error <= report.check.tolerance < report.check.sensitivity


class Rounded(nn.Module):
    """Halves a row at its width, which goes through a tensor that is computed with on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.first, self.gates, self.last = nn.Linear(6, 16), nn.Linear(16, 32), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        half = torch.IntTensor([self.width]).sum()
        hidden = self.first(x).view(-1, self.width)
        hidden = hidden if hidden.sum() > 0 else hidden * 2
        both = self.gates(hidden)
        return self.last(both[:, :half].tanh() * both[:, half:].sigmoid() + hidden.new_zeros(1))


def test_a_size_that_goes_through_a_tensor_is_not_taken_for_a_decision() -> None:
    graph = depgraph.trace(Rounded().eval(), torch.randn(5, 6))
    first = next(axis.name for axis in graph.axes if axis.name.startswith("first"))
    with pytest.raises(CheckError, match=r"16 became 15.*protect that size's axis"):
        graph.cut_plan({first: [3]}).apply()


class Drawing(nn.Module):
    """Looks at rows in an order that it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.multinomial(torch.ones(len(x)), 2)
        return self.last(self.first(x[chosen[chosen >= 0]]).relu())


def test_what_is_drawn_is_drawn_once() -> None:
    _, report = pruned(Drawing().eval(), torch.randn(5, 6))
    assert report.check.error <= report.check.tolerance < report.check.sensitivity


class Matching(nn.Module):
    """Gives every row the nearest target, then none to the rows that are far, as the losses of detectors do."""

    def __init__(self, *, rows_of_their_own: bool) -> None:
        super().__init__()
        self.first, self.last, self.rows_of_their_own = nn.Linear(6, 16), nn.Linear(16, 2), rows_of_their_own

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        near, which = torch.cdist(targets, x).min(dim=0)
        which[near > near.median()] = -1
        if not self.rows_of_their_own:
            return self.last(self.first(x).relu()) - targets[which.clamp(min=0), :2]
        which[which >= 0] += 1
        rows = torch.where(which > 0)[0]
        return self.last(self.first(x).relu())[rows] - targets[which[rows] - 1, :2]


@pytest.mark.parametrize("rows", [False, True])
def test_what_is_decided_may_be_written_to(rows: bool) -> None:
    model, given = Matching(rows_of_their_own=rows).eval(), (torch.randn(7, 6), torch.randn(3, 6))
    plan = depgraph.trace(model, given).plan(importance.Magnitude(), depgraph.Target(params=0.7))
    report = plan.apply_with_report()
    assert report.check is not None and report.check.error <= report.check.tolerance < report.check.sensitivity
    other = (torch.randn(9, 6), torch.randn(3, 6))
    torch.testing.assert_close(report.model(*other), zeroed(model, plan)(*other))


class Scattering(nn.Module):
    """Rows that their own values pick go through a layer, and back to their places."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.whole = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3), whole

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        mask = (hidden.mean(-1) > 0)[..., None]
        rows = self.inner(hidden.masked_select(mask).unflatten(0, (-1, hidden.shape[-1])))
        return self.last(hidden.masked_scatter(mask.expand_as(hidden) if self.whole else mask, rows))


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_mask_of_values_scatters_goes_to_the_same_places(whole: bool) -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Scattering(whole).eval(), torch.randn(40, 6))
    (hidden,) = graph.axes
    for group in range(hidden.size):
        report = graph.cut_plan({hidden.name: [group]}).apply_with_report()
        assert report.check is not None and report.check.error <= report.check.tolerance < report.check.sensitivity


class Counting(nn.Module):
    """Counts its calls in a buffer and keeps a row of what it saw last, each through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 4)
        self.calls: Tensor
        self.seen: Tensor
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[:1] += 1
        hidden = self.first(x).relu()
        self.seen[0].copy_(hidden[0])
        return self.last(hidden * 2 if hidden.sum() > 0 else hidden)


def test_buffers_that_the_forward_writes_are_as_they_were() -> None:
    net = Counting().eval()
    _, report = pruned(net, torch.randn(2, 4))
    for model in (net, report.model):
        assert not model.calls.any()
        assert not model.seen.any()
    assert report.model.seen.shape[1] == report.model.last.in_features < 16


def test_a_wrong_cut_is_seen() -> None:
    net, inputs = Detector().eval(), torch.randn(1, 3, 32, 32)
    graph = depgraph.trace(net, inputs)
    plan = graph.cut_plan({"body.0.weight:0": [0, 1, 2]})
    smaller = plan.apply()
    with torch.no_grad():
        smaller.body[2].weight.add_(0.1)
    from depgraph.cutting.verifying import Verifier

    with pytest.raises(depgraph.errors.CheckError, match="differs from the zeroed original"):
        Verifier(plan).check(smaller)


def test_there_is_no_graph_form_and_no_way_without_values() -> None:
    net, inputs = Detector().eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(CutError, match="no graph form, as its code depends on values at tests/test_decisions"):
        depgraph.trace(net, inputs).cut_plan({"body.0.weight:0": [0]}).apply(form="graph")
    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        depgraph.trace(net.to("meta"), inputs.to("meta"))


class Unseen(nn.Module):
    """Reads memory itself, as a compiled extension does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not x.data_ptr():
            raise RuntimeError("there is no data")
        held = (ctypes.c_float * x.numel()).from_address(x.data_ptr())
        copy = torch.frombuffer(bytearray(held), dtype=x.dtype).view(x.shape)
        return self.head(torch.relu(self.body(x + copy)))


def test_what_torch_does_not_see_gives_no_graph_form() -> None:
    model, x = Unseen().eval(), torch.randn(4, 8)
    plan = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.5))
    with pytest.raises(CutError, match="computes something from its inputs that torch doesn't see"):
        plan.apply(form="graph")
    pruned, expected, other = plan.apply(form="module"), zeroed(model, plan), torch.randn(4, 8)
    torch.testing.assert_close(pruned(other), expected(other))


class Grid(nn.Module):
    """Picks by a mask of two dims: where it is true comes as two tensors that share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x))[x[..., 0] > 0])


def test_a_mask_of_two_dims_picks() -> None:
    torch.manual_seed(0)
    model, x = Grid().eval(), torch.randn(4, 6, 8)
    plan = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.5))
    pruned, expected, other = plan.apply(), zeroed(model, plan), torch.randn(3, 5, 8)
    torch.testing.assert_close(pruned(other), expected(other), rtol=1e-4, atol=1e-5)


class Routed(nn.Module):
    """Asks in Python which expert a token goes to: experts in a list keep their numbers."""

    def __init__(self, ask: Callable[[Tensor], Iterable[int]]) -> None:
        super().__init__()
        self.before, self.router = nn.Linear(6, 12), nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(4))
        self.after, self.ask = nn.Linear(12, 5), ask

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        made = [self.experts[int(number)](token) for number, token in zip(self.ask(self.router(x)), x, strict=True)]
        return self.after(x + torch.stack(made))


ASKS: dict[str, Callable[[Tensor], Iterable[int]]] = {
    "argmax": lambda scores: scores.argmax(-1).tolist(),
    "item": lambda scores: [row.argmax().item() for row in scores],
    "top-k": lambda scores: scores.topk(1)[1][:, 0].tolist(),
    "sort": lambda scores: scores.sort(descending=True)[1][:, 0],
    "numpy": lambda scores: scores.numpy().argmax(-1),
    "comparison": lambda scores: [int(torch.nonzero(row == row.max())[0, 0]) for row in scores],
}


@pytest.mark.parametrize("name", ASKS)
def test_what_is_chosen_in_python_keeps_its_numbers_and_unchosen_experts_fit(name: str) -> None:
    torch.manual_seed(0)
    model, x = Routed(ASKS[name]).eval(), torch.randn(2, 6)
    graph = depgraph.trace(model, (x,))
    plan = graph.plan(importance.Random(seed=0), depgraph.Target(params=0.6))
    pruned, expected = plan.apply(), zeroed(model, plan)
    assert pruned.router.out_features == 4 and pruned.router.in_features < 12
    with torch.no_grad():
        for inputs in (x, torch.randn(30, 6)):  # which goes through all experts
            torch.testing.assert_close(pruned(inputs), expected(inputs), rtol=1e-4, atol=1e-5)


class ByWayOfNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.from_numpy(np.sqrt(torch.relu(self.first(x)).detach().numpy()))
        return self.head(torch.relu(self.second(hidden)))


def test_what_goes_through_numpy_keeps_its_size() -> None:
    torch.manual_seed(0)
    model, x = ByWayOfNumpy().eval(), torch.randn(4, 8)
    graph = depgraph.trace(model, (x,))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))
    pruned = plan.apply()
    assert pruned.first.out_features == 32 and pruned.second.out_features < 24
    for inputs in (x, torch.randn(4, 8)):
        torch.testing.assert_close(pruned(inputs), zeroed(model, plan)(inputs), rtol=1e-4, atol=1e-5)


class Tasks(nn.Module):
    """A head for each task, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.heads = nn.ModuleDict({"first": nn.Linear(16, 3), "second": nn.Linear(16, 5)})

    def forward(self, x: Tensor, task: str = "first") -> Tensor:
        return self.heads[task](torch.relu(self.body(x)))


def test_entries_of_a_dict_that_the_example_passes_by_go_with_the_one_it_takes() -> None:
    model, x = Tasks().eval(), torch.randn(4, 6)
    plan = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.6))
    pruned, expected = plan.apply(), zeroed(model, plan)
    assert pruned.body.out_features < 16
    for task in ("first", "second"):
        torch.testing.assert_close(pruned(x, task=task), expected(x, task=task), rtol=1e-4, atol=1e-5)


class FixedView(nn.Module):
    """Branches on a value, and has a size in its code that a cut would change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 0:
            y = y * 2
        return self.second(y.view(-1, 3, 4).flatten(1))


def test_a_refusal_does_not_offer_a_form_that_there_is_not() -> None:
    graph = depgraph.trace(FixedView().eval(), (torch.randn(4, 8),))
    plan = graph.cut_plan({"first.weight:0/blocks": [0]})
    with pytest.raises(
        CutError, match=r"the code gives the number 3; plan with form='module' to leave such axes whole$"
    ):
        plan.apply()
