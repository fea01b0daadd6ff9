"""Rotary pairs as complex numbers, beside a part of the head that isn't turned and loses a dimension."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import depgraph


class PartlyTurned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.made, self.read = nn.Linear(5, 12), nn.Linear(12, 3)
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.3, 0.7])))

    def forward(self, x: Tensor) -> Tensor:
        still, pairs = self.made(x).split([8, 4], -1)
        turned = torch.view_as_complex(pairs.unflatten(-1, (2, 2))) * self.turn
        return self.read(torch.cat([still, torch.view_as_real(turned).flatten(-2)], -1))


def test_a_stride_that_a_cut_makes_odd_is_no_obstacle_to_the_graph_form() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(PartlyTurned().eval(), torch.randn(4, 7, 5))
    axis = next(a for a in graph.axes if a.size == 8)
    report = graph.cut_plan({axis.name: [2]}).apply_with_report(form="graph")
    assert report.check is not None
    assert report.check.error < 1e-5
    assert report.model(torch.randn(4, 7, 5)).shape == (4, 7, 3)
