"""Fused operators that add a branch to a stream and normalise the sum: what they consist of, and how they come apart.

Their fourth output is the sum, the stream that goes on. A bias that they add too is the branch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from depgraph.onnx_door.copies import graphs

_SUM = 3
_NOTE = "depgraph.sums"
"""Where a model notes the sums that got a name here."""


@dataclass(frozen=True)
class Skip:
    """The operator that normalises only, positions of the operands for that, and of the bias."""

    norm: str
    given: tuple[int, ...]
    bias: int


SKIPS = {
    "SkipLayerNormalization": Skip("LayerNormalization", (2, 3), 4),
    "SkipSimplifiedLayerNormalization": Skip("SimplifiedLayerNormalization", (2,), 3),
}
_WEIGHED = frozenset(["MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv"])


def adds_and_norms(node: ir.Node) -> bool:
    """Is an operator such a one?"""
    return (
        node.op_type in SKIPS
        and node.domain == "com.microsoft"
        and len(node.outputs) > 0
        and bool(node.outputs[0].name)
    )


def bias_of(node: ir.Node) -> ir.Value | None:
    """The vector that is added to the branch."""
    at = SKIPS[node.op_type].bias
    return node.inputs[at] if at < len(node.inputs) else None


def branch_side(node: ir.Node) -> int:
    """Which of the first two operands the bias belongs to: the second, unless only the first comes from a product with weights."""
    made = [value.producer() if value is not None else None for value in node.inputs[:2]]
    first, second = (one is not None and one.op_type in _WEIGHED for one in made)
    return 0 if first and not second else 1


def name_sums(model: ir.Model) -> ir.Model:
    """The model with a name for every such sum; a copy where one is missing."""
    if all(len(node.outputs) > _SUM and node.outputs[_SUM].name for node in _all(model)):
        return model
    copy = model.clone()
    copy.meta.update(model.meta)
    taken = {value.name for graph in graphs(copy.graph) for node in graph for value in node.outputs}
    named = []
    for node in _all(copy):
        count = len(node.outputs)
        if count <= _SUM:
            node.resize_outputs(_SUM + 1)
            for value in node.outputs[count:]:
                value.name = ""
        made = node.outputs[_SUM]
        if not made.name:
            name = f"{node.outputs[0].name}_sum"
            while name in taken:
                name += "_"
            taken.add(name)
            made.name = name
            named.append(name)
    copy.meta[_NOTE] = named
    return copy


def forget_sums(model: ir.Model, original: ir.Model) -> None:
    """Take the names away again that `name_sums` gave and nothing reads."""
    named = set(original.meta.get(_NOTE, ()))
    for node in _all(model) if named else ():
        made = node.outputs[_SUM] if len(node.outputs) > _SUM else None
        if made is None or made.name not in named or made.uses() or made.is_graph_output():
            continue
        made.name = ""
        count = max(k for k, value in enumerate(node.outputs) if value.name) + 1
        node.resize_outputs(count)


def take_apart(node: ir.Node) -> tuple[ir.Node | None, ir.Node, ir.Node]:
    """In a copy of a model, the addition of the bias, that of the branch, and the norm, in the operator's place."""
    skip, bias = SKIPS[node.op_type], bias_of(node)
    sides = list(node.inputs[:2])
    whole, base = node.outputs[_SUM], node.outputs[0].name
    biased = None
    if bias is not None:
        side = branch_side(node)
        biased = ir.node("Add", [sides[side], bias], name=f"{base}_bias")
        biased.outputs[0].name = f"{base}_biased"
        sides[side] = biased.outputs[0]
    added = ir.node("Add", sides, name=f"{base}_add")
    given = {"axis": -1, **{k: a.value for k, a in node.attributes.items() if k == "epsilon"}}
    norm = ir.node(
        skip.norm,
        [added.outputs[0], *(node.inputs[k] for k in skip.given if k < len(node.inputs))],
        given,
        name=node.name,
    )
    for new, old in ((added, whole), (norm, node.outputs[0])):
        name, out = old.name, new.outputs[0]
        out.type, out.shape = old.type, old.shape
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        old.name, out.name = f"{name}_fused", name
    made = [one for one in (biased, added, norm) if one is not None]
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, made)
    node.graph.remove(node, safe=True)
    return biased, added, norm


def _all(model: ir.Model) -> Iterator[ir.Node]:
    for graph in graphs(model.graph):
        yield from [node for node in graph if adds_and_norms(node)]
