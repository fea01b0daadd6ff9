"""The check runs a pruned model as its user does: code may take another way while it is captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import CheckError

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
