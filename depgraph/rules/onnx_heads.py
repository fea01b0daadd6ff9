"""Attention and recurrent layers as single operators of ONNX and com.microsoft."""

from __future__ import annotations

import numpy as np

from depgraph.graph import Value, Work
from depgraph.rules.onnx_shared import fused, onnx, operand, result
from depgraph.rules.registry import Op, rule

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule(*onnx("LSTM GRU RNN"))
def recurrent(op: Op) -> None:
    """x [s, n, i], W [d, g·u, i], R [d, g·u, u], B [d, 2·g·u], states [d, n, u], P [d, 3·u] -> y [s, d, n, u], last states."""
    name = op.target.split(".")[1]
    relations, gates = op.relations, _GATES[name]
    source, weight, back, bias, lengths, *states = (operand(op, k) for k in range(8))
    assert source is not None and weight is not None and back is not None
    gate, both = relations.new_dim(gates), relations.new_dim(2)
    unit = back.dim(2)
    relations.fold(weight.dim(1), [gate, unit])
    relations.fold(back.dim(1), [gate, unit])
    relations.align(weight.dim(2), source.dim(2))
    if bias is not None:
        relations.fold(bias.dim(1), [both, gate, unit])
    if states[2] is not None:
        peepholes = relations.new_dim(3)
        relations.fix(peepholes, op.reason("each gate has a task of its own"))
        relations.fold(states[2].dim(1), [peepholes, unit])
    step, sample = (1, 0) if op.get("layout") else (0, 1)
    made = list(op.outputs)
    _states(op, [v for v in states[:2] if v is not None], made, unit, source.dim(sample))
    for dim in (gate, both):
        relations.fix(dim, op.reason("each gate has a task of its own"))
    directed = [v for v in (weight, back, bias, states[2]) if v is not None]
    for value in directed:
        op.fix(value, 0, "each direction has weights of its own")
    op.fix(source, step, "steps are counted along it")
    op.contract(source, 2, product=weight.first)
    for value in (weight, back):
        op.contract(value, 2, product=value.first)
        relations.work.append(Work(op.name, (*source.dims[:2], *value.dims)))
    if lengths is not None:
        op.fix(source, sample, "each sample has a length of its own")


def _states(op: Op, given: list[Value], made: list[Value], unit: int, sample: int) -> None:
    """All states go by units; y [s, d, n, u] or [n, s, d, u] has one more dim than the others, [d, n, u] or [n, d, u]."""
    for value in (*given, *made):
        op.relations.align(value.dim(-1), unit)
        layout = op.get("layout")
        at = 0 if layout else len(value.shape) - 2
        op.relations.align(value.dim(at), sample)
        for d in range(len(value.shape) - 1):
            if d != at:
                op.fix(value, d, "it counts steps or directions")


@rule("onnx.Attention")
def attention(op: Op) -> None:
    """softmax(q kᵀ) v; operands of three dims have heads and width in one, [n, s, h·d], those of four apart, [n, h, s, d]."""
    query, key, value, mask, *past, lengths = (operand(op, k) for k in range(7))
    assert query is not None and key is not None and value is not None
    heads = int(op.get("q_num_heads") or query.shape[1])
    _attend(op, (query, key, value), heads, int(op.get("kv_num_heads") or key.shape[1]))
    for one in (mask, result(op, 3)):
        _scored(op, one)
    if lengths is not None:
        op.fix(op.output, 0, "each sample has a length of its own")
    _cached(op, past, [result(op, 1), result(op, 2)])


@rule(*fused("MultiHeadAttention GroupQueryAttention"))
def heads(op: Op) -> None:
    """q [n, s, h·d], k and v [n, t, g·d]; or all three in one, [n, s, (h + 2g)·d]. Operands packed in other ways are left alone."""
    query, key, value = (operand(op, k) for k in range(3))
    grouped = op.target.endswith("GroupQueryAttention")
    if query is not None and key is None and value is None and grouped and len(query.shape) == 3:
        _attend_in_one(op, query)
    elif query is None or key is None or value is None or {len(v.shape) for v in (query, key, value)} != {3}:
        op.fix_all("queries, keys and values are packed into one tensor")
        return
    else:
        count = int(op["num_heads"])
        _attend(op, (query, key, value), count, int(op.get("kv_num_heads") or count))
    if not grouped:
        bias, past = operand(op, 3), [operand(op, 6), operand(op, 7)]
        others = [operand(op, k) for k in (4, 5, 8, 9)]
        if bias is not None and key is not None and value is not None:
            _beside(op, bias.dim(0), [query.dim(-1), key.dim(-1), value.dim(-1)])
    else:
        op.fix(query, 0, "each sample has a length of its own")
        for width in op["lead"][2:]:
            op.relations.fix(width, op.reason("its kernel takes heads of multiples of eight"))
        past, others = [operand(op, 3), operand(op, 4)], [operand(op, k) for k in range(5, 12)]
    _cached(op, past, [result(op, 1), result(op, 2)])
    for other in others:
        for dim in other.dims if other is not None else ():
            op.relations.fix(dim, op.reason("it masks or turns what is attended to"))
    if op.get("do_rotary"):
        op.relations.fix(op["width"], op.reason("pairs of it are turned together"))


def _attend_in_one(op: Op, packed: Value) -> None:
    """Relations of queries, keys and values that lie one after the other in the last dim."""
    relations, heads, groups = op.relations, int(op["num_heads"]), int(op["kv_num_heads"])
    group, ratio = relations.new_dim(groups), relations.new_dim(heads // groups)
    width, across = (relations.new_dim(packed.shape[2] // (heads + 2 * groups)) for _ in range(2))
    size = relations.sizes[width]
    parts = [relations.new_dim(count * size) for count in (heads, groups, groups)]
    for part, inner in zip(parts, ([group, ratio, width], [group, width], [group, across]), strict=True):
        relations.fold(part, inner)
    _beside(op, packed.dim(2), parts)
    relations.fold(op.output.dim(2), [group, ratio, across])
    for d in (0, 1):
        relations.align(packed.dim(d), op.output.dim(d))
    if relations.sizes[ratio] > 1:
        relations.fix(ratio, op.reason("every head of keys serves as many heads of queries"))
    op.fix(packed, 1, "attention may count along it")
    op.arguments["width"], op.arguments["lead"] = width, (group, ratio, width, across)
    for each in (width, across):
        relations.work.append(Work(op.name, (packed.dim(0), group, ratio, packed.dim(1), each, packed.dim(1))))


def _beside(op: Op, whole: int, dims: list[int]) -> None:
    """A dim made of several one after the other."""
    offset = 0
    for dim in dims:
        size = op.relations.sizes[dim]
        op.relations.align_at(dim, np.arange(size), whole, np.arange(offset, offset + size))
        offset += size


def _attend(op: Op, operands: tuple[Value, Value, Value], heads: int, groups: int) -> None:
    """Relations of queries, keys and values of `heads` heads, of which each of `groups` heads of keys serves as many."""
    query, key, value = operands
    relations = op.relations
    group, ratio = relations.new_dim(groups), relations.new_dim(heads // groups)
    width = relations.new_dim(query.shape[-1] // heads if len(query.shape) == 3 else query.shape[-1])
    across = relations.new_dim(value.shape[-1] // groups if len(value.shape) == 3 else value.shape[-1])
    for operand_, inner, shares in (
        (query, width, True),
        (key, width, False),
        (value, across, False),
        (op.output, across, True),
    ):
        lead = [group, ratio] if shares else [group]
        if len(operand_.shape) == 3:
            relations.fold(operand_.dim(2), [*lead, inner])
        else:
            relations.fold(operand_.dim(1), lead)
            relations.align(operand_.dim(3), inner)
        relations.align(operand_.dim(0), op.output.dim(0))
    relations.align(query.dim(-2), op.output.dim(-2))
    relations.align(key.dim(-2), value.dim(-2))
    if relations.sizes[ratio] > 1:
        relations.fix(ratio, op.reason("every head of keys serves as many heads of queries"))
    op.contract(query, -1)
    op.contract(key, -1)
    op.arguments["width"] = width
    op.arguments["lead"] = (group, ratio, width, across)
    relations.mix(key.dim(-2), "attention's softmax mixes it")
    for side in (query, key):
        op.fix(side, -2, "attention may count along it")
    run = (op.output.dim(0), group, ratio, query.dim(-2))
    relations.work += [Work(op.name, (*run, width, key.dim(-2))), Work(op.name, (*run, across, key.dim(-2)))]


def _scored(op: Op, scores: Value | None) -> None:
    """Scores, or a mask of them, [n, h, s, t]; of a mask, samples and heads may be left out, or be one."""
    if scores is None:
        return
    for dim in scores.dims[-2:]:
        op.relations.fix(dim, op.reason("it masks what is attended to, or says how"))
    if len(scores.shape) > 2 and scores.shape[-3] > 1:
        group, ratio, *_ = op["lead"]
        op.relations.fold(scores.dim(-3), [group, ratio])
    if len(scores.shape) > 3:
        op.relations.align(scores.dim(-4), op.output.dim(0))


def _cached(op: Op, past: list[Value | None], present: list[Value | None]) -> None:
    """Keys and values of before, [n, h, t, d], which queries meet too, and with them those of now."""
    group, _, *inner = op["lead"]
    if past[0] is not None:
        op.contract(op.inputs[0], -1, product=1)
        op.contract(past[0], -1, product=1)
    for side in (past, present):
        for value, width in zip(side, inner, strict=False):
            if value is not None and len(value.shape) == 4:
                op.relations.align(value.dim(0), op.output.dim(0))
                op.relations.align(value.dim(1), group)
                op.relations.align(value.dim(3), width)
                op.fix(value, 2, "attention may count along it")


@rule(*fused("Attention"))
def packed_attention(op: Op) -> None:
    """x [n, s, i], W [i, q + k + v], b [q + k + v] -> [n, s, v]: products and attention in one."""
    source, weight, bias = (operand(op, k) for k in range(3))
    assert source is not None and weight is not None
    relations, heads = op.relations, int(op["num_heads"])
    total = weight.shape[1]
    sizes = [int(s) for s in op.get("qkv_hidden_sizes") or [total // 3] * 3]
    relations.align(source.dim(2), weight.dim(0))
    op.contract(source, 2)
    head, width, across = (
        relations.new_dim(heads),
        relations.new_dim(sizes[0] // heads),
        relations.new_dim(sizes[2] // heads),
    )
    offset, parts = 0, [relations.new_dim(size) for size in sizes]
    for k, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        relations.fold(part, [head, width if k < 2 else across])
        at = np.arange(offset, offset + size)
        for value in (weight, bias):
            if value is not None:
                relations.align_at(part, np.arange(size), value.dim(-1), at)
        offset += size
    relations.fold(op.output.dim(2), [head, across])
    for value in (source, op.output):
        op.fix(value, 1, "attention may count along it")
    relations.align(source.dim(0), op.output.dim(0))
    relations.fix(width, op.reason("queries and keys of the operator have one width"))
    op.arguments["lead"] = (head, across, parts)
    relations.work.append(Work(op.name, (*source.dims, weight.dim(1))))
    steps = source.dim(1)
    for inner in (width, across):
        relations.work.append(Work(op.name, (source.dim(0), head, steps, inner, steps)))
    for other in [operand(op, k) for k in range(3, 7)] + [*op.outputs[1:]]:
        for dim in other.dims if other is not None else ():
            relations.fix(dim, op.reason("it masks, or keeps, what is attended to"))


@rule("onnx.RotaryEmbedding", "microsoft.RotaryEmbedding")
def turned(op: Op) -> None:
    """Pairs of the width are turned by angles that tables give: none of them goes, whole heads may."""
    source = operand(op, 0)
    assert source is not None
    relations = op.relations
    op.align_elementwise([source, op.output])
    heads = int(op.get("num_heads") or 0)
    if len(source.shape) == 3 and heads:
        width = relations.new_dim(source.shape[-1] // heads)
        op.arguments["heads"] = relations.new_dim(heads)
        relations.fold(source.dim(-1), [op["heads"], width])
    else:
        width = source.dim(-1)
    relations.fix(width, op.reason("pairs of it are turned together"))
    for d in (0, 1 if len(source.shape) == 3 else 2):
        op.fix(source, d, "places along it say how far pairs are turned")
    for value in op.inputs[1:]:
        for dim in value.dims:
            relations.fix(dim, op.reason("it says how far pairs are turned"))
