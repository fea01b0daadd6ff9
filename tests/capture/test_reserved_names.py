"""Models whose parts have names that a torch.fx.GraphModule has for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import depgraph

NAMES = ("code", "graph", "meta", "_in_spec")


class Named(nn.Module):
    """A hidden layer of that name, a buffer and a parameter behind it, and a normalisation, which needs both forms."""

    def __init__(self, name: str, other: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(6, 8))
        self.register_parameter(other, nn.Parameter(torch.rand(8)))
        self.register_buffer("count", torch.zeros(1))
        self.norm, self.out, self.names = nn.LayerNorm(8), nn.Linear(8, 3), (name, other)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        layer, scale = (getattr(self, name) for name in self.names)
        return self.out(self.norm(layer(x).relu() * scale))


@pytest.mark.parametrize("name", NAMES)
def test_a_part_may_be_called_as_what_a_graph_module_has(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = NAMES[NAMES.index(name) - 1]
    model, x = Named(name, other).eval(), torch.randn(2, 6)
    graph = depgraph.trace(model, x)
    plan = graph.cut_plan({graph.axes[0].name: [1, 4]})
    pruned = plan.apply_with_report(form="graph")
    assert pruned.check.error < 1e-5 < pruned.check.sensitivity
    torch.testing.assert_close(pruned.model(x), plan.apply(form="module")(x))
    depgraph.save(pruned.model, tmp_path / "saved")
    assert torch.equal(depgraph.load(tmp_path / "saved", model=Named(name, other))(x), pruned.model(x))
