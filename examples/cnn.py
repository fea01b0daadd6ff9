"""A hand-written CNN with a residual block and grouped convolutions; `build` is what `depgraph prune examples/cnn.py:build` takes."""

import torch
from torch import nn

import depgraph
import importance


class Block(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(torch.relu(self.norm(self.grouped(x))))


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The network and its example inputs."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), Block(32, 4), Block(32, 4))
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return model.eval(), (torch.randn(2, 3, 32, 32),)


if __name__ == "__main__":
    network, inputs = build()
    graph = depgraph.trace(network, inputs)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(macs=0.5))
    print(plan)
    print(plan.apply_with_report())
