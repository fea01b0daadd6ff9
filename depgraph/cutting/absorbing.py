"""Numbers that the code computes from a size and that would drift with the cut are made up for in the weights.

Attention without an explicit scale takes it from the width of its queries; code that divides by ``sqrt(x.shape[-1])`` does
the same. The weights that make what such an operator reads (`weights_behind`) are multiplied by what is missing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from depgraph.capture.places import place
from depgraph.cutting.advice import axes_of, instead
from depgraph.cutting.expressing import Drift, Solution
from depgraph.cutting.weights_behind import Rows, Search, Twice, Way
from depgraph.errors import CutError
from depgraph.graph import Value
from depgraph.operators import aten_name
from depgraph.widths import Kept
from depgraph.wording import axis_and_more

if TYPE_CHECKING:
    from depgraph.capture.sizes import Expr
    from depgraph.dependency import DependencyGraph

_NEAR = 1e-9
Done = dict[tuple[str, int, int], float]
"""Factors that were put into weights, by the parameter, the dim and the index along it."""


def absorb(graph: DependencyGraph, model: nn.Module, drifts: list[Drift], kept: Kept) -> None:
    """Multiply weights of the cut `model` so that every drift is made up for, once.

    Raises CutError where the way back to the weights is barred, or two drifts want different things of one weight.
    """
    search = Search(graph, drifts)
    done: Done = {}
    for drift in sorted(drifts, key=lambda drift: len(search.ways(drift))):
        ways = search.ways(drift)
        if not ways:
            raise CutError(
                f"{drift.where}: the code computes a number from a size, which the cut changes by a factor of {drift.ratio:.4f}, "
                f"and no weight that only this reads can make up for it; {instead(graph, kept)}"
            )
        if any(_is_whole(way, drift, done) for way in ways):
            continue
        way = next((way for way in ways if done.keys().isdisjoint(_places(way))), None)
        if way is None:
            raise _twice(drift, ways, instead(graph, kept))
        done.update(dict.fromkeys(_places(way), _on(way, drift)))
        for target, rows in way.items():
            _scale(graph, model, target, rows, kept, _on(way, drift))
    for drift in drifts:
        begun = [way for way in search.ways(drift) if not done.keys().isdisjoint(_places(way))]
        if len(begun) != 1 or not _is_whole(begun[0], drift, done):
            raise _twice(drift, begun, instead(graph, kept))


def can_absorb(graph: DependencyGraph, drifts: list[Drift]) -> bool:
    """Is there a weight for every drift that can make up for it?"""
    search = Search(graph, drifts) if drifts else None
    return search is None or all(search.ways(drift) for drift in drifts)


def beyond(graph: DependencyGraph) -> frozenset[str]:
    """Axes from whose sizes the code computes numbers that no weight can make up for, as far as can be told without a cut.

    Such a number, a size or a root of one, is looked for among those that operators multiply or divide by where the code makes it.
    """
    return frozenset(graph.sizes.once("beyond", lambda: _beyond(graph)))


def why_beyond(graph: DependencyGraph) -> str:
    """Of the axes that are `beyond`, which stay whole in the module, and where in the code; empty where there are none."""
    places = graph.sizes.once("beyond", lambda: _beyond(graph))
    if not places:
        return ""
    where = next(iter(places.values()))
    kept = axis_and_more(list(places))
    return f"; the module keeps all of {kept}, as the code computes numbers from such sizes that no weight can make up for ({where})"


def _beyond(graph: DependencyGraph) -> dict[str, str]:
    leaks: dict[str, list[Expr]] = {}
    for leak in graph.capture.recording.leaks:
        leaks.setdefault(leak.where, []).append(leak.expr)
    rules, dense = graph.sizes, graph.widths.at({})
    read: dict[Node, list[Expr]] = {}
    for node in rules.nodes.values() if leaks else ():
        number = _factor(node)
        there = leaks.get(place(node), []) if number is not None else []
        read[node] = [expr for expr in there if _made_of(number, rules.value(expr, dense, Solution()))]
    drifts = {Drift(node.name, 2.0, place(node), 0.5): exprs for node, exprs in read.items() if exprs}
    search = Search(graph, list(drifts)) if drifts else None
    barred = [(e, drift.where) for drift, exprs in drifts.items() if search and not search.ways(drift) for e in exprs]
    return {name: where for expr, where in barred for name in axes_of(graph, expr)}


def _factor(node: Node) -> float | None:
    """The number that an operator multiplies or divides by."""
    numbers = [n for n in node.args if isinstance(n, float)] if aten_name(node) in ("mul", "div") else []
    return numbers[0] if numbers else None


def _made_of(number: float | None, size: object) -> bool:
    """Is a number a size, its square or fourth root, or one over these?"""
    if number is None or not isinstance(size, (int, float)) or not size > 0 or not number > 0:
        return False
    return any(math.isclose(number, size**power, rel_tol=1e-6) for power in (1, -1, 0.5, -0.5, 0.25, -0.25))


def _twice(drift: Drift, ways: list[Way], advice: str) -> CutError:
    return CutError(
        f"{drift.where}: parameter {next(iter(ways[0]))!r} would have to make up for two different factors; {advice}"
    )


def _is_whole(way: Way, drift: Drift, done: Done) -> bool:
    """Do all rows of a way have the factor that they take for a drift?"""
    return all(abs(done.get(place, 0) - _on(way, drift)) < _NEAR for place in _places(way))


def _on(way: Way, drift: Drift) -> float:
    """The factor that the rows of a way take."""
    return math.sqrt(drift.factor) if isinstance(way, Twice) else drift.factor


def _places(way: Way) -> list[tuple[str, int, int]]:
    """Each row that a way scales."""
    return [(target, int(rows[-1]), int(row)) for target, rows in way.items() for row in rows[:-1]]


def _scale(graph: DependencyGraph, model: nn.Module, target: str, rows: Rows, kept: Kept, factor: float) -> None:
    value = next(v for v in graph.capture.program.values.values() if v.target == target)
    tensor = model.get_parameter(target)
    d = _row_dim(value, rows)
    stays = kept.of(value, d)
    stays = np.arange(value.shape[d]) if stays is None else stays
    mask = torch.from_numpy(np.isin(stays, rows[:-1]))
    scale = torch.ones(len(stays), dtype=tensor.dtype).masked_fill(mask, factor).to(tensor.device)
    shape = [1] * tensor.ndim
    shape[d] = -1
    with torch.no_grad():
        tensor.mul_(scale.reshape(shape))


def _row_dim(value: Value, rows: Rows) -> int:
    """The last entry of `rows` says which dim they count along."""
    return int(rows[-1]) % len(value.shape)
