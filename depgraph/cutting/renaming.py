"""What the tensors of a model are called after a cut: where a block leaves a list, those behind it move up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.fx import GraphModule

from depgraph.cutting.experts import leaving, with_entries
from depgraph.cutting.shortening import shortening_of
from depgraph.cutting.shorter import renamed

if TYPE_CHECKING:
    from depgraph.plan import Plan


def names_after(plan: Plan, model: nn.Module) -> dict[str, str]:
    """The names in `model`, which the plan gave, of parameters and buffers by those in the original; what left is missing."""
    graph = plan.graph
    names = {name: name for name in graph.held()}
    if not isinstance(model, GraphModule):
        entries = with_entries(plan)
        steps = [shortening_of(graph, plan.branches)] if plan.branches else []
        steps += [leaving(graph, entries)] if entries and not plan.branches else []
        for how in steps:
            names = renamed(graph.model, how)
    if plan.branches:
        gone = graph.left_out(plan.branches).parameters
        names = {name: new for name, new in names.items() if name not in gone}
    return names
