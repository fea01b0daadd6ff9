"""Shapes of what com.microsoft's fused operators make: onnx itself knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from depgraph.onnx_door.folding import Type, shape_of, tensor_type

if TYPE_CHECKING:
    from depgraph.onnx_door.evaluating import Evaluator

Shapes = Sequence["tuple[int, ...] | None"]
FUSED: dict[str, Callable[[Evaluator, ir.Node], list[Type | None]]] = {}
Given = list["tuple[int, ...] | None"]


def _fused(*names: str, like: int = 0) -> Callable[[Callable[[Given, ir.Node], Shapes]], None]:
    """Put a function from the operands' shapes to the results' into the table; all have the type of operand `like`."""

    def register(function: Callable[[Given, ir.Node], Shapes]) -> None:
        def kinds(evaluator: Evaluator, node: ir.Node) -> list[Type | None]:
            types = [None if v is None else evaluator.types.get(v) for v in node.inputs]
            first = types[like] if len(types) > like else None
            shapes = [shape_of(kind) for kind in types]
            if first is None or shapes[0] is None:
                return [None] * len(node.outputs)
            try:
                made = function(shapes, node)
            except (TypeError, IndexError, ValueError, AssertionError):  # an operand that it needs isn't known
                return [None] * len(node.outputs)
            dtype = first.tensor_type.elem_type
            return [None if shape is None else tensor_type(dtype, shape) for shape in made]

        for name in names:
            FUSED[name] = kinds

    return register


def _number(node: ir.Node, name: str, otherwise: int) -> int:
    found = node.attributes.get(name)
    return otherwise if found is None else int(found.value)


@_fused("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasAdd", "RotaryEmbedding", "GroupNorm", "BiasDropout")
def _same(given: Given, node: ir.Node) -> Shapes:
    return [given[0]] * len(node.outputs)


@_fused("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "SkipGroupNorm")
def _normed(given: Given, node: ir.Node) -> Shapes:
    """The result, two statistics, and the sum that was normalised."""
    first = given[0]
    assert first is not None
    return [first, (*first[:-1], 1), (*first[:-1], 1), first][: len(node.outputs)]


@_fused("LayerNormalization")
def _normed_early(given: Given, node: ir.Node) -> Shapes:
    """As the operator set has it from 17 on: runtimes know it in files of older ones too, where a fusion has put it."""
    first = given[0]
    assert first is not None
    axis = _number(node, "axis", -1) % len(first)
    statistics = (*first[:axis], *[1] * (len(first) - axis))
    return [first, statistics, statistics][: len(node.outputs)]


@_fused("DequantizeLinear", like=1)
def _scaled(given: Given, node: ir.Node) -> Shapes:
    return [given[0]]


@_fused("QuantizeLinear", like=2)
def _rounded(given: Given, node: ir.Node) -> Shapes:
    return [given[0]]


@_fused("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul")
def _product(given: Given, node: ir.Node) -> Shapes:
    left, right = given[0], given[1]
    assert left is not None and right is not None
    if _number(node, "transA", 0):
        left = (*left[:-2], left[-1], left[-2])
    if _number(node, "transB", 0):
        right = (*right[:-2], right[-1], right[-2])
    return [(*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])]


@_fused("FusedGemm")
def _general_product(given: Given, node: ir.Node) -> Shapes:
    left, right = given[0], given[1]
    assert left is not None and right is not None
    return [(left[1 if _number(node, "transA", 0) else 0], right[0 if _number(node, "transB", 0) else 1])]


@_fused("FusedConv", "NhwcFusedConv")
def _convolved(given: Given, node: ir.Node) -> Shapes:
    source, weight = given[0], given[1]
    assert source is not None and weight is not None
    rank = len(source) - 2
    attr = {
        name: list(node.attributes[name].value) for name in ("pads", "strides", "dilations") if name in node.attributes
    }
    pads, strides, steps = (
        attr.get("pads", [0] * 2 * rank),
        attr.get("strides", [1] * rank),
        attr.get("dilations", [1] * rank),
    )
    if str(getattr(node.attributes.get("auto_pad"), "value", "NOTSET")) not in ("NOTSET", "VALID"):
        return [(source[0], weight[0], *(-(-source[2 + k] // strides[k]) for k in range(rank)))]
    space = [
        (source[2 + k] + pads[k] + pads[k + rank] - steps[k] * (weight[2 + k] - 1) - 1) // strides[k] + 1
        for k in range(rank)
    ]
    return [(source[0], weight[0], *space)]


@_fused("Attention")
def _packed_attention(given: Given, node: ir.Node) -> Shapes:
    """x [n, s, i], W [i, q + k + v] -> [n, s, v]."""
    source, weight = given[0], given[1]
    assert source is not None and weight is not None
    sizes = node.attributes.get("qkv_hidden_sizes")
    width = int(sizes.value[2]) if sizes is not None else weight[1] // 3
    return [(*source[:-1], width), *[None] * (len(node.outputs) - 1)]


@_fused("MultiHeadAttention")
def _heads(given: Given, node: ir.Node) -> Shapes:
    """q [n, s, h·d], k and v [n, t, h·d] or [n, h, t, d] -> [n, s, h·dv]."""
    query, value = given[0], given[2] if len(given) > 2 else None
    heads = _number(node, "num_heads", 1)
    assert query is not None
    if len(query) == 5:  # packed [n, s, h, 3, d]
        return [(query[0], query[1], query[2] * query[4]), *[None] * (len(node.outputs) - 1)]
    if value is None:
        return [query, *[None] * (len(node.outputs) - 1)]
    width = value[-1] if len(value) == 3 else heads * value[-1]
    past, steps = given[6] if len(given) > 6 else None, value[-2]
    total = steps + (past[2] if past is not None else 0)
    present = (query[0], heads, total, width // heads)
    keys = (query[0], heads, total, query[-1] // heads)
    return [(*query[:-1], width), keys, present][: len(node.outputs)]


@_fused("GroupQueryAttention")
def _grouped_heads(given: Given, node: ir.Node) -> Shapes:
    """q [n, s, h·d], k and v [n, s, g·d], past [n, g, t, d] -> [n, s, h·d] and present keys and values."""
    query, key, past = given[0], given[1], given[3] if len(given) > 3 else None
    assert query is not None
    groups = _number(node, "kv_num_heads", 1)
    if key is None:
        size = query[-1] // (_number(node, "num_heads", 1) + 2 * groups)
        width = size * _number(node, "num_heads", 1)
    else:
        size, width = key[-1] // groups, query[-1]
    total = query[1] + (past[2] if past is not None else 0)
    present = (query[0], groups, total, size)
    return [(*query[:-1], width), present, present][: len(node.outputs)]


@_fused("EmbedLayerNormalization", like=2)
def _embedded(given: Given, node: ir.Node) -> Shapes:
    ids, table = given[0], given[2]
    assert ids is not None and table is not None
    made = (*ids, table[1])
    return [made, (ids[0],), made][: len(node.outputs)]
