"""The shapes of what a cut module's code computes, beside the prediction: where a wrong cut shows first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from depgraph.cutting.rerunning import calls_of, inputs_at
from depgraph.errors import CheckError
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def require_shapes(graph: DependencyGraph, model: nn.Module, kept: Kept) -> int:
    """Compare the shape of all that torch calls of a module cut to `kept` make, and something reads, with the prediction.

    How many were compared: none where it makes other calls than the original did. What nothing reads may be laid out
    otherwise on meta tensors.

    Raises:
        CheckError: a shape isn't as predicted.
    """
    calls, recorded = calls_of(graph, model, inputs_at(graph, kept)), graph.capture.recording.calls
    values, nodes = graph.capture.program.values, graph.sizes.nodes
    if [c.function for c in recorded] != [c.function for c in calls]:
        return 0
    seen = [
        (values[name], shape, before)
        for before, after in zip(recorded, calls, strict=True)
        for name, shape in zip(before.outputs, after.shapes, strict=False)
        if name in values and nodes[name].users and len(values[name].shape) == len(shape)
    ]
    for (_, shape, call), wanted in zip(seen, kept.shapes(value for value, _, _ in seen), strict=True):
        if shape != wanted:
            raise CheckError(f"{call.function} at {call.where} gives shape {shape}, predicted was {wanted}")
    return len(seen)
