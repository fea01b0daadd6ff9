"""A convolution of groups multiplies parts of a stream by themselves, which no rotation of the whole allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import RotationError
from importance import recipes

WIDTH = 12


class Grouped(nn.Module):
    """A stream of 12 channels over positions; a convolution of groups reads it (`reads`), or writes to it."""

    def __init__(self, reads: bool, groups: int) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(5, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.over = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups)
        self.mix, self.reads = nn.Linear(WIDTH, WIDTH), reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.norm(x) if self.reads else self.mix(self.norm(x)).relu()
        made = self.over(inner.mT).mT
        return self.head(self.norm(x + (self.mix(made.relu()) if self.reads else made)))


def graph_of(reads: bool) -> tuple[depgraph.DependencyGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 5)
    return depgraph.trace(Grouped(reads, WIDTH).eval(), x), x


def test_one_rotation_is_refused_where_a_convolution_of_groups_reads_the_stream() -> None:
    graph, x = graph_of(True)
    with pytest.raises(RotationError, match=r"conv1d in 'over' .*multiplies parts of its channels by themselves"):
        recipes.slicegpt([x]).prune(graph, depgraph.Target(params=0.8))


@pytest.mark.parametrize("reads", [True, False])
def test_rotations_end_before_a_convolution_of_groups(reads: bool) -> None:
    graph, x = graph_of(reads)
    prepare = recipes.slicegpt_shortcuts([x]).prepare
    assert prepare is not None
    turned = prepare(graph)
    turned.settle(turned.graph.cut_plan())
    assert turned.axes
    assert torch.allclose(turned.graph.model(x), graph.model(x), atol=1e-5)
