"""The same model with half of every axis: how an operator that isn't looked up in a table follows its size.

Such operators don't take time in proportion to their elements: a norm has work for every row, whatever its width, and what comes to
fit into a cache takes less. So each is measured at a second size, in its place in the model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from depgraph.errors import DepgraphError
from depgraph.onnx_door.cutting import cut_model
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.widths import Kept

_LEFT = 2  # one in so many groups


def halved(graph: OnnxGraph) -> Kept:
    """What is left of the graph where half of the groups of every axis, of those that may, have gone."""
    removal = dict[str, np.ndarray]()
    for axis in graph.axes:
        step, free = graph.widths.step(axis.name), np.flatnonzero(axis.prunable)
        most = min(axis.size - axis.size // _LEFT, axis.size - graph.widths.least(axis.name), len(free))
        most -= most % step
        if most > 0:
            removal[axis.name] = free[len(free) - most :]
    return graph.widths.at(removal)


def narrow_model(graph: OnnxGraph) -> ir.Model | None:
    """The model at these widths; None where it can't be cut so."""
    try:
        return cut_model(graph, halved(graph)).model
    except DepgraphError:
        return None


def through(points: list[tuple[float, float]]) -> Callable[[float], float]:
    """The line from point to point (size, milliseconds), ascending, that never falls; beyond the last one it goes on."""
    sizes, times = np.array([p[0] for p in points]), np.maximum.accumulate([p[1] for p in points])
    slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
    last = float(sizes[-1])
    return lambda size: float(np.interp(size, sizes, times) + max(size - last, 0.0) * slope)
