"""The scales of normalisations: which weights multiply, channel by channel, what a normalisation has made.

Found in the graph by what operators do: a normalisation is an operator that is one, or a quotient of something by the root of
a mean, sum or variance (or by a norm) of something, however it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.fx import Node, map_arg

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.operators import argument, operator_name, writes
from importance.activation import with_unread
from importance.layout import Layout
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec, Scored
from importance.stream_parts import name_of

_NORMS = {
    *("batch_norm", "native_batch_norm", "cudnn_batch_norm", "instance_norm", "group_norm", "native_group_norm"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training"),
    *("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"),
}
_QUOTIENTS = {"mul", "mul_", "div", "div_"}
_MOVES = {
    *("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "getitem"),
    *("view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten"),
    *("expand", "expand_as"),
}
_ROOTS = {"rsqrt", "sqrt", "pow"}
_STEPS = _MOVES | _ROOTS | {"add", "add_", "sub", "clamp", "clamp_min", "maximum", "reciprocal", "mul", "div"}
_SUMS = {"mean", "sum", "var", "var_mean"}
_LENGTHS = {"norm", "linalg_vector_norm", "std", "std_mean"}
_NEAR = 4  # operators between what is measured and its mean
_FAR = 12  # operators between a reduction and the quotient by its root


@dataclass(frozen=True)
class NormScale:
    """|scale| of the normalisations that a group's channels go through: network slimming's score (METHODS.md 2.4).

    It says something after training that pulled the scales of batch normalisations to zero (a penalty on their sum), and is
    then compared across layers; layer and RMS norms and those of groups count alike, as does a normalisation that the model
    writes out itself. A scale that is computed (one plus a parameter) counts as what comes out. Several indices of one group
    are added, then (by default) the normalisations averaged. Axes without a normalisation's scale go last, by the size of
    their weights.

    Args:
        reduction: over normalisations: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.

    Raises ScoreError: for an unknown name, at once; when called, for scales that are NaN or infinite, and for a model in
    which no axis has a normalisation with a scale.
    """

    comparable: ClassVar[bool] = True

    reduction: ReductionSpec = "mean"
    normalise: NormalisationSpec = "none"

    def __post_init__(self) -> None:
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        Layout.of(graph)  # refuses weights without values, and those that have changed since
        members: dict[str, list[Scored]] = {axis.name: [] for axis in graph.axes}
        for node in _scales(graph):
            for axis, scored in _members(graph, node):
                members[axis].append(scored)
        reduction, normalisation = Reduction.of(self.reduction), Normalisation.of(self.normalise)
        scores = {name: normalisation(reduction(read, graph[name].size)) for name, read in members.items() if read}
        if graph.axes and not scores:
            raise ScoreError(
                f"no normalisation in {graph.name} has a scale for the channels of an axis: take another score"
            )
        return with_unread(graph, scores)


_SCALED_BY = {
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"), 1),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), 1),
    "SkipLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2,
}
"""The operand by which a file's normalisation scales."""


def _members(graph: DependencyGraph, node: Node) -> Iterator[tuple[str, Scored]]:
    """For every axis that a scale has channels of: their groups, and their absolute values."""
    value = graph.capture.program.values.get(node.name)
    if value is None:
        return
    axes = {d: graph.widths.axes_of(value.dim(d)) for d in range(len(value.shape))}
    if not any(axes.values()):
        return
    scale = _computed(graph, node).detach().abs().double().cpu()
    if not bool(torch.isfinite(scale).all()):
        raise ScoreError(
            f"the scale of the normalisation at {value.target or value.where or value.name} holds NaN or infinite values: "
            "repair or reload the weights before scoring"
        )
    for d, names in axes.items():
        sums = scale.movedim(d, 0).flatten(1).sum(dim=1).numpy() if scale.ndim > 1 else scale.numpy()
        for name in names:
            yield name, (graph[name].labels[graph.widths.class_of(value.dim(d))], sums)


@torch.no_grad()
def _computed(graph: DependencyGraph, node: Node) -> Any:
    """What a node that no input reaches comes to."""
    if node.op != "call_function":
        return graph.tensor(graph.capture.program.values[node.name].target)
    args = map_arg(node.args, lambda n: _computed(graph, n))
    kwargs = map_arg(node.kwargs, lambda n: _computed(graph, n))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _scales(graph: DependencyGraph) -> list[Node]:
    """The nodes that are a normalisation's scale, each once."""
    if isinstance(graph, OnnxGraph):
        return _in_file(graph)
    found = _Finder(graph)
    scales = (scale for node in found.nodes for scale in found.scales(node))
    return [node for node in dict.fromkeys(scales) if node in found.weights]


def _in_file(graph: OnnxGraph) -> list[Any]:
    """The stored tensors that a file's normalisations scale by, as steps."""
    lowered, steps = graph.capture.lowered, {step.name: step for step in graph.nodes}
    values = (
        lowered.operand(node, _SCALED_BY[node.op_type])
        for node in lowered.operators.values()
        if _SCALED_BY.get(node.op_type, len(node.inputs)) < len(node.inputs)
    )
    names = dict.fromkeys(value.name for value in values if value is not None and value.kind == "parameter")
    return [steps[name] for name in names]


class _Finder:
    """Which nodes of a captured program depend on its inputs, and which of these a normalisation makes."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.nodes = list(graph.capture.exported.graph.nodes)
        values = graph.capture.program.values
        self.moving: set[Node] = set()
        self.weights: set[Node] = set()
        for node in self.nodes:
            value = values.get(node.name)
            if node.op in ("placeholder", "get_attr"):
                (self.moving if value is None or value.kind == "input" else self.weights).add(node)
                if value is not None and value.kind not in ("input", "parameter"):
                    self.weights.discard(node)
            elif not self.moving.isdisjoint(node.all_input_nodes) or writes(node):
                self.moving.add(node)
            elif not self.weights.isdisjoint(node.all_input_nodes):
                self.weights.add(node)

    def scales(self, node: Node) -> Iterator[Node]:
        """What multiplies here what a normalisation has made."""
        name = operator_name(node.target)
        if name in _NORMS and (own := _own_scale(node)) is not None:
            yield own
        if name in ("mul", "mul_"):
            nodes = [argument for argument in node.args[:2] if isinstance(argument, Node)]
            for one, other in (nodes, nodes[::-1]) if len(nodes) == 2 else ():
                if one not in self.moving and other in self.moving and self.normalises(self._origin(other)):
                    yield one
        if name in _QUOTIENTS:
            moving = [argument for argument in node.all_input_nodes if argument in self.moving]
            for root, other in (moving, moving[::-1]) if len(moving) == 2 else ():
                if (measured := self._measured(root)) is not None:
                    yield from self._multiplied_before(other, measured)

    def _multiplied_before(self, node: Node, measured: Node) -> Iterator[Node]:
        """What a product was multiplied with that is to be normalised by the measure of its other factor: w * x * rsqrt(x^2)."""
        product = self._origin(node)
        given = [argument for argument in product.args[:2] if isinstance(argument, Node)]
        if name_of(product) not in ("mul", "mul_") or len(given) != 2 or product in self._before(measured):
            return
        for one, other in (given, given[::-1]):
            if one not in self.moving and other in self.moving:
                yield one

    def _before(self, node: Node) -> set[Node]:
        """A node and what it is computed from, a few operators up."""
        found, edge = {node}, [node]
        for _ in range(_NEAR):
            edge = [n for e in edge for n in e.all_input_nodes if n in self.moving and n not in found]
            found.update(edge)
        return found

    def normalises(self, node: Node) -> bool:
        """Is a node a normalisation that has no scale of its own?"""
        name = operator_name(node.target)
        if name in _NORMS:
            return _own_scale(node) is None
        if name not in _QUOTIENTS:
            return False
        return any(argument in self.moving and self._is_root(argument) for argument in node.all_input_nodes)

    def _origin(self, node: Node) -> Node:
        """Where a value was made that has since been moved about and changed its dtype only."""
        while name_of(node) in _MOVES:
            node = node.all_input_nodes[0]
        return node

    def _is_root(self, node: Node) -> bool:
        """Is a value the root of a mean, a sum or a variance, or a norm, give or take constants?"""
        return self._measured(node) is not None

    def _measured(self, node: Node) -> Node | None:
        """The mean, sum, variance or norm that a value is (the root of), give or take constants; None where it is none."""
        rooted = False
        for _ in range(_FAR):
            name = name_of(node)
            if name in _LENGTHS or (name in _SUMS and rooted):
                return node
            if name not in _STEPS:
                return None
            rooted = rooted or name in _ROOTS
            given = node.all_input_nodes[:1] if name in _MOVES else node.all_input_nodes
            before = [n for n in given if n in self.moving]
            if len(before) != 1:
                return None
            node = before[0]
        return None


def _own_scale(node: Node) -> Node | None:
    scale = argument(node, "weight")
    return scale if isinstance(scale, Node) else None
