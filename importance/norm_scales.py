"""BN-scale: what a normalisation multiplies a channel with says what the channel is worth."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from depgraph import DependencyGraph
from depgraph.cutting.sides import operator_name
from depgraph.errors import ScoreError
from depgraph.finite import require_finite
from importance.activation import with_unread
from importance.layout import Layout
from importance.magnitude import check_power
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec
from importance.stored import Stored
from importance.sums import index_sums

_RESHAPES = frozenset(
    ["to", "_to_copy", "clone", "contiguous", "detach", "alias", "type_as"]
    + ["view", "view_as", "reshape", "_unsafe_view", "expand", "expand_as", "broadcast_to", "unsqueeze", "squeeze"]
)
_STATISTICS = frozenset(
    ["mean", "var", "std", "var_mean", "std_mean", "sum", "amax", "linalg_vector_norm", "norm", "frobenius_norm"]
)
_FAR = 16


@dataclass(frozen=True)
class NormScale:
    """|gamma| of the normalisations that a channel passes (network slimming; METHODS.md 2.4, BN scale).

    Which parameters are scales is read from the graph: what a batch, layer, group, instance or RMS norm takes as its weight,
    and what is multiplied, element by element, with something that was divided by a statistic of itself, so that norms that are
    written out count too. A scale that is computed from its parameter (1 + w) counts as it is computed.

    Channels of a group are averaged, and so are the norms that it passes, so that scores of all axes compare as in the
    paper's global threshold. An axis that passes no norm with a scale has no such score: it goes last, by the size of its
    weights.

    Args:
        p: the power of |gamma|, above 0.
        reduction: over norms: a name, a function or a `Reduction`.
        normalise: per axis.

    Raises ScoreError for an unknown name; when called, for NaN or infinite weights, by name.
    """

    comparable: ClassVar[bool] = True

    p: float = 1.0
    reduction: ReductionSpec = Reduction("mean", within="mean")
    normalise: NormalisationSpec = "none"

    def __post_init__(self) -> None:
        check_power(self.p)
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_finite(graph.model, ScoreError)
        layout = Layout.of(graph)
        sums: dict[str, dict[int, Tensor]] = {}
        names = {id(tensor): name for name, tensor in layout.parameters.items()}
        for parameter, scale in scales_of(graph):
            name = names.get(id(parameter))
            if name is not None:
                sums.setdefault(name, self._sizes(scale, layout.dims[name]))
        scores = layout.scores(sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))
        return with_unread(graph, {axis: scores[axis] for axis in layout.known(sums)})

    def _sizes(self, scale: Tensor, dims: tuple[int, ...]) -> dict[int, Tensor]:
        """|gamma|^p per index, the mean over the other dims that a scale has."""
        sums = index_sums(lambda w: w.abs().pow(self.p), (scale,), dims)
        return {d: found * scale.shape[d] / scale.numel() for d, found in sums.items()}


def scales_of(graph: DependencyGraph) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters that are scales of a normalisation, each with the scale that is computed from it, in its own shape."""
    stored = Stored(graph)
    for node in stored.nodes:
        for scale in _scales(node, stored):
            held = stored.made_of[scale]
            parameter = stored.tensors[next(iter(held))] if len(held) == 1 else None
            if parameter is not None and _numel(scale) == parameter.numel():
                yield parameter, stored.tensor(scale).reshape(parameter.shape)


def _scales(node: Node, stored: Stored) -> Iterator[Node]:
    """The weight of a fused normalisation; of a product with a statistic of one of its factors, those made of parameters."""
    name = operator_name(node.target)
    if name in ("mul", "div"):
        factors = _factors(node, stored)
        moving = [f for f in factors if f not in stored.made_of]
        if any(_is_statistic(by, of) for by in moving for of in moving if by is not of):
            yield from (f for f, multiplies in factors.items() if multiplies and f in stored.made_of)
    elif "norm" in name and "backward" not in name:
        weight = _argument(node, "weight")
        if isinstance(weight, Node) and weight in stored.made_of:
            yield weight


def _factors(node: Node, stored: Stored) -> dict[Node, bool]:
    """What is multiplied to make `node`, in whatever order and form; False for what it is divided by."""
    found: dict[Node, bool] = {}
    queue = [(node, True)]
    while queue and len(found) < _FAR:
        here, multiplies = queue.pop()
        origin = here if here in stored.made_of else _origin(here)
        name = operator_name(origin.target)
        if name in ("mul", "div") and origin not in stored.made_of:
            divides = [False, name == "div"]
            queue += [(n, multiplies != d) for n, d in zip(origin.args, divides, strict=False) if isinstance(n, Node)]
        else:
            found[origin] = multiplies
    return found


def _is_statistic(by: Node, of: Node) -> bool:
    """Is `by`, which is smaller than `of`, computed from a statistic of the latter, element by element?"""
    by = _origin(by)
    if _numel(by) >= _numel(of):
        return False
    reductions = [n for n in _elementwise_up(by) if operator_name(n.target) in _STATISTICS]
    sources = set(_elementwise_up(of))
    return any(not sources.isdisjoint(_elementwise_up(n)) for r in reductions for n in r.all_input_nodes)


def _elementwise_up(node: Node) -> Iterator[Node]:
    """A node and what it is computed from, up to and with the first nodes that aren't elementwise."""
    queue, seen = deque([node]), {node}
    while queue and len(seen) < 4 * _FAR:
        here = queue.popleft()
        yield here
        if _is_elementwise(here):
            fresh = [n for n in here.all_input_nodes if n not in seen]
            seen.update(fresh)
            queue.extend(fresh)


def _is_elementwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    name = operator_name(node.target)
    return torch.Tag.pointwise in tags or name in _RESHAPES or getattr(node.target, "__name__", "") == "getitem"


def _origin(node: Node) -> Node:
    """The node that `node` is a copy of, in another form or dtype."""
    while operator_name(node.target) in _RESHAPES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _numel(node: Node) -> int:
    made = node.meta.get("val")
    return int(made.numel()) if isinstance(made, Tensor) else 0


def _argument(node: Node, wanted: str) -> Any:
    """An argument by its schema name; None where there is none of that name."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if wanted not in names:
        return None
    at = names.index(wanted)
    return node.args[at] if at < len(node.args) else node.kwargs.get(wanted)
