"""Indices that the example's slices leave out stay: inputs of other sizes read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import depgraph
import importance
from tests.test_end_to_end import zeroed


class Positions(nn.Module):
    """Adds the first rows of a table, as many as the sequence is long; another tensor's tail is read from the back."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tail = nn.Parameter(torch.randn(1, 50, 24)), nn.Parameter(torch.randn(30, 24))
        self.first, self.second, self.head = nn.Linear(5, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) + self.table[:, : x.shape[1]] + self.tail.narrow(0, 30 - x.shape[1], x.shape[1])
        return self.head(self.second(hidden.relu()).relu())


def test_positions_that_the_example_is_too_short_for_stay() -> None:
    torch.manual_seed(0)
    model = Positions().eval()
    graph = depgraph.trace(model, (torch.rand(2, 7, 5),))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5))
    pruned = plan.apply()
    assert pruned.get_parameter("table").shape[1] == 50
    assert pruned.get_parameter("tail").shape[0] == 30
    longer = torch.rand(2, 20, 5)
    torch.testing.assert_close(pruned(longer), zeroed(model, plan)(longer))


def test_what_two_slices_read_between_them_may_go() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(16, 5)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x @ self.weight[:8].mT).relu() * (x @ self.weight[8:].mT))

    graph = depgraph.trace(Halves().eval(), (torch.rand(2, 5),))
    (axis,) = (axis for axis in graph.axes if not axis.reasons)
    assert {(m.target, m.dim) for m in axis.members} == {("weight", 0), ("head.weight", 1)}
