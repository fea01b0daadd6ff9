"""A plan is data: look at it, protect a part, change it by hand, save it, merge it, apply it."""

from pathlib import Path

import torch
from torch import nn

import depgraph
import importance

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
graph = depgraph.trace(model, torch.randn(2, 16))

plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.6), protect="2.weight:0", round_to=8)
print(plan)

edited = plan.with_axis("2.weight:0", range(8))
print("removed by the edited plan:", [(r.target, r.dim, len(r.indices)) for r in edited.removed()])

Path("out").mkdir(exist_ok=True)
edited.save("out/plan.json")
again = depgraph.Plan.load(graph, "out/plan.json")
print((again | plan).apply_with_report())
