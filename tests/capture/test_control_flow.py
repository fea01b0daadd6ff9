"""Control flow as torch has functions for it: what is within is cut as all else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import cond, map, scan, while_loop  # type: ignore[attr-defined]

import depgraph
import importance


class Around(nn.Module):
    """A layer before and one behind what the classes below have between them, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small, self.large = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.last = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.within(torch.relu(self.first(x))))

    def within(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class Conditional(Around):
    def within(self, hidden: Tensor) -> Tensor:
        found: Tensor = torch.cond(hidden.mean() > 0.3, lambda h: self.large(h).tanh(), self._small, (hidden,))
        return found

    def _small(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.small(hidden))


class Named(Conditional):
    """By a name that was imported."""

    def within(self, hidden: Tensor) -> Tensor:
        found: Tensor = cond(hidden.mean() > 0.3, lambda h: self.large(h).tanh(), self._small, (hidden,))
        return found


class Scanned(Around):
    """A recurrence over the samples, from the last to the first, that gives what it had before each of them."""

    def within(self, hidden: Tensor) -> Tensor:
        def step(before: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tanh(self.small(before) + x), self.large(before)

        last, all_ = scan(step, torch.zeros_like(hidden[0]), hidden.T, dim=1, reverse=True)
        found: Tensor = all_.T + last
        return found


class Mapped(Around):
    def within(self, hidden: Tensor) -> Tensor:
        found: Tensor = map(
            lambda xs, y: torch.relu(self.small(xs[0])) * xs[1] + y, (hidden, hidden.cos()), self.large(hidden[0])
        )
        return found


class Counted(Around):
    def within(self, hidden: Tensor) -> Tensor:
        count = torch.tensor(0)
        _, found = while_loop(lambda k, h: k < 3, lambda k, h: (k + 1, torch.tanh(self.small(h))), (count, hidden))
        return self.large(found)


def by_closure() -> type[Around]:
    """A class whose method has the name from around it."""
    from torch._higher_order_ops.scan import scan as inner

    class Within(Around):
        def within(self, hidden: Tensor) -> Tensor:
            found: Tensor = inner(
                lambda h, x: (torch.tanh(self.small(h) + x), self.large(h)), torch.zeros_like(hidden[0]), hidden
            )[1]
            return found

    return Within


@pytest.mark.parametrize(
    "kind", [lambda: Conditional, lambda: Named, lambda: Scanned, lambda: Mapped, lambda: Counted, by_closure]
)
def test_what_is_within_is_cut(kind: Callable[[], type[Around]]) -> None:
    torch.manual_seed(0)
    model, x = kind()().eval(), torch.randn(5, 8)
    graph = depgraph.trace(model, x, strict=True)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5))
    zeroed = _zeroed(model, plan)
    for form in ("module", "graph"):
        report = plan.apply_with_report(form=form)
        assert report.check.error < 1e-5 < report.check.sensitivity
        with torch.no_grad():
            for given in (x, x * 9):
                assert torch.allclose(report.model(given), zeroed(given), atol=1e-5)
    assert plan.apply().small.in_features < 24


def test_both_ways_of_a_condition_are_taken_by_the_test_above() -> None:
    torch.manual_seed(0)
    model, x = Conditional().eval(), torch.randn(5, 8)
    assert bool(torch.relu(model.first(x)).mean() > 0.3) != bool(torch.relu(model.first(x * 9)).mean() > 0.3)


class Halting(Around):
    """Goes on until what it computes is small."""

    def within(self, hidden: Tensor) -> Tensor:
        (found,) = while_loop(
            lambda h: h.abs().mean() > 0.3, lambda h: (torch.tanh(self.small(h)) * 0.7,), (hidden * 9,)
        )
        return self.large(found)


def test_a_loop_that_ends_by_values_is_cut_as_the_example_goes() -> None:
    torch.manual_seed(0)
    model, x = Halting().eval(), torch.randn(5, 8)
    plan = depgraph.trace(model, x).plan(importance.Magnitude(), depgraph.Target(params=0.5))
    report = plan.apply_with_report()
    assert report.check.error < 1e-5 < report.check.sensitivity and report.model.small.in_features < 24


def test_names_are_what_they_were_afterwards() -> None:
    before = (torch.cond, cond, scan, map, while_loop)
    depgraph.trace(Scanned().eval(), torch.randn(5, 8))
    assert before == (torch.cond, globals()["cond"], globals()["scan"], globals()["map"], globals()["while_loop"])


def _zeroed(model: nn.Module, plan: depgraph.Plan) -> nn.Module:
    whole = copy.deepcopy(model)
    held = dict(whole.named_parameters())
    with torch.no_grad():
        for removed in plan.removed():
            held[removed.target].index_fill_(removed.dim, torch.as_tensor(removed.indices), 0)
    return whole
