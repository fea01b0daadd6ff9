"""An operator of one's own: without a rule its dims can't go; one line of axis equation makes them prunable."""

import torch
from torch import nn

import depgraph
import importance


@torch.library.custom_op("example::scaled_relu", mutates_args=())
def scaled_relu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * scale


@scaled_relu.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)
        self.scale = nn.Parameter(torch.rand(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(scaled_relu(self.up(x), self.scale))


torch.manual_seed(0)
model, inputs = Network().eval(), torch.randn(2, 8)
graph = depgraph.trace(model, inputs)
print("without a rule:", [(axis.name, int(axis.prunable.sum())) for axis in graph.axes], dict(graph.unknown))

depgraph.rule("example::scaled_relu", "... c, c -> ... c")
graph = depgraph.trace(model, inputs)
print("with one:", [(axis.name, int(axis.prunable.sum())) for axis in graph.axes])
print(graph.plan(importance.Magnitude(), depgraph.Target(params=0.5)).apply_with_report())
