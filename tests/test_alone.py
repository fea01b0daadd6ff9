"""The check runs a pruned model as its user does: code may take another way while it is captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import CheckError, CutError
from tests.test_expert_lists import EXPERTS, WIDTH, Stacking

FULL = 16


class Asking(nn.Module):
    """Its code asks whether it is being captured, and does `more` where it isn't."""

    def __init__(self, more: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, FULL), nn.Linear(FULL, 6)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        """A small feed-forward part."""
        hidden = F.relu(self.up(x))
        return self.down(hidden if torch.compiler.is_compiling() else self.more(hidden))


def same(hidden: Tensor) -> Tensor:
    """What is captured, in other words."""
    return hidden * 3 / 3


def by_size(hidden: Tensor) -> Tensor:
    """Nothing else as long as the size stays."""
    return hidden * (hidden.shape[-1] / FULL)


def of_one_size(hidden: Tensor) -> Tensor:
    """Impossible for another size."""
    return hidden.view(-1, FULL)


def twice(hidden: Tensor) -> Tensor:
    """Another computation, whatever the size."""
    return hidden * 2


def planned(more: Callable[[Tensor], Tensor]) -> depgraph.Plan:
    torch.manual_seed(0)
    graph = depgraph.trace(Asking(more).eval(), torch.randn(3, 6))
    return graph.plan(importance.Magnitude(), depgraph.Target(params=0.7))


def test_a_model_that_takes_another_way_to_the_same_is_checked_as_it_runs() -> None:
    check = planned(same).apply_with_report().check
    assert check is not None and check.error < check.tolerance and check.captured == 0


@pytest.mark.parametrize(("more", "says"), [(by_size, "something else when it simply runs"), (of_one_size, "fails")])
def test_a_cut_that_is_right_only_while_it_is_captured_is_refused(more: Callable[[Tensor], Tensor], says: str) -> None:
    plan = planned(more)
    with pytest.raises(CheckError, match=says):
        plan.apply(form="module")
    before = plan.graph.model.state_dict()
    with pytest.raises(CheckError, match=says):
        plan.apply_()
    after = plan.graph.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_is_no_capture_of_itself_is_checked_as_it_was_captured() -> None:
    plan = planned(twice)
    check = plan.apply_with_report().check
    assert check is not None and check.captured > 0.1
    assert "as it was captured" in str(check)
    with pytest.raises(CheckError, match="use plan.apply()"):
        plan.apply_()


class Deep(nn.Module):
    """Residual layers; its code asks as well."""

    def __init__(self, more: Callable[[Tensor, nn.ModuleList], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(4))
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        """All layers."""
        for layer in self.layers:
            x = x + layer(x)
        return x if torch.compiler.is_compiling() else self.more(x, self.layers)


def shortened(more: Callable[[Tensor, nn.ModuleList], Tensor]) -> depgraph.Plan:
    torch.manual_seed(0)
    graph = depgraph.trace(Deep(more).eval(), torch.randn(3, 6))
    return graph.cut_plan(branches=[graph.branches[1].name])


def test_a_shorter_model_is_checked_as_it_runs() -> None:
    check = shortened(lambda x, layers: x * 3 / 3).apply_with_report().check
    assert check is not None and check.error < check.tolerance and check.captured == 0
    check = shortened(lambda x, layers: x * 2).apply_with_report().check
    assert check is not None and check.captured > 0.1


def test_a_shorter_model_that_is_right_only_while_it_is_captured_is_refused() -> None:
    plan = shortened(lambda x, layers: x * (sum(p.numel() for p in layers.parameters()) / (4 * 123)))
    with pytest.raises(CheckError, match="something else when it simply runs"):
        plan.apply(form="module")
    model, x = plan.graph.model, torch.randn(2, 6)
    before = model(x)
    with pytest.raises((CheckError, CutError)):
        plan.apply_()
    assert torch.equal(model(x), before)


def test_a_layer_that_is_counted_when_the_model_runs_stays_and_does_nothing() -> None:
    plan = shortened(lambda x, layers: x * (len(layers) / 4))
    x, report = torch.randn(2, 6), plan.apply_with_report(form="module")
    layers: nn.ModuleList = plan.graph.model.layers  # type: ignore[assignment]
    expected = x
    for layer in (layers[0], layers[2], layers[3]):
        expected = expected + layer(expected)
    torch.testing.assert_close(report.model(x), expected)
    assert report.check is not None and report.check.captured == 0


class Wary(Stacking):
    """Experts one by one; its code asks as well, of how many experts there are."""

    more: Callable[[Tensor, int], Tensor]

    def mixed(self, x: Tensor) -> Tensor:
        """What the experts give."""
        made = super().mixed(x)
        return made if torch.compiler.is_compiling() else self.more(made, len(self.experts))  # type: ignore[arg-type]


def of_experts(more: Callable[[Tensor, int], Tensor]) -> depgraph.DependencyGraph:
    torch.manual_seed(0)
    model = Wary().eval()
    model.more = more
    return depgraph.trace(model, torch.randn(4, WIDTH))


def test_experts_go_only_where_the_model_is_right_without_them_when_it_runs() -> None:
    assert not [axis for axis in of_experts(lambda made, count: made * (count / EXPERTS)).axes if axis.entries]
    for factor, captured in ((3 / 3, False), (2.0, True)):
        graph = of_experts(lambda made, count, factor=factor: made * factor)
        (axis,) = (axis for axis in graph.axes if axis.entries)
        check = graph.cut_plan({axis.name: [1]}).apply_with_report().check
        assert check is not None and check.chosen == 1 and (check.captured > 0.1) == captured
