"""Micro models: one operator of a model at many sizes beside each other, small on disk as their weights are made on loading.

Node k of a micro model, named n<k>, is the operator at the k-th of the points; what stands before and after it only makes
its input and shortens its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Point = tuple[int, int]
_OPSET, _IR = 18, 9
_FEW = 16  # channels of the input that all points share


@dataclass(frozen=True)
class Signature:
    """An operator but for its widths. `kind` is "conv", "depthwise" or "matmul".

    For convolutions `space` is the input's spatial sizes and `settings` the attributes that decide how they are gone over;
    for products `space` is the sizes in front of the contracted one.
    """

    kind: str
    batch: int
    space: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> list[int]:
        """The shape of the input that all points share."""
        if self.kind == "matmul":
            return [*self.space, _FEW]
        return [self.batch, _FEW, *self.space]

    def work(self, point: Point) -> int:
        """Multiply-accumulates at some widths, but for strides, which make them fewer."""
        wide = point[1] if self.kind == "depthwise" else math.prod(point)
        return self.batch * math.prod(self.space) * wide * math.prod(dict(self.settings).get("kernel_shape", ()))


@dataclass
class _Draft:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: list[onnx.TensorProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def weight(self, name: str, shape: Sequence[int]) -> str:
        """A tensor of equal values, which ONNX Runtime makes when it loads the model."""
        fill = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
        self.stored.append(numpy_helper.from_array(np.array(shape, np.int64), f"{name}_shape"))
        value = numpy_helper.from_array(np.array([fill], np.float32))
        self.nodes.append(helper.make_node("ConstantOfShape", [f"{name}_shape"], [name], value=value))
        return name

    def add(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def end(self, name: str) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def micro_model(signature: Signature, points: Sequence[Point], places: Sequence[int]) -> onnx.ModelProto:
    """The `points` (channels in and out) of one signature at some places side by side; its input "x" is of `signature.shape`."""
    draft = _Draft()
    add = _matmul if signature.kind == "matmul" else _conv
    for k in places:
        draft.end(add(draft, signature, k, points[k]))
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, signature.shape)
    graph = helper.make_graph(draft.nodes, "micro", [source], draft.outputs, draft.stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="depgraph")
    made.ir_version = _IR
    return made


def _conv(draft: _Draft, signature: Signature, k: int, point: Point) -> str:
    wide_in, wide_out = point
    settings = dict(signature.settings)
    kernel, ones = settings["kernel_shape"], [1] * len(signature.space)
    depthwise = signature.kind == "depthwise"
    source = draft.add("Conv", ["x", draft.weight(f"a{k}", [wide_in, _FEW, *ones])], f"in{k}", kernel_shape=ones)
    weight = draft.weight(f"w{k}", [wide_out, 1 if depthwise else wide_in, *kernel])
    bias = draft.weight(f"b{k}", [wide_out])
    made = draft.add("Conv", [source, weight, bias], f"n{k}", group=wide_in if depthwise else 1, **settings)
    return draft.add("GlobalAveragePool", [made], f"out{k}")


def _matmul(draft: _Draft, signature: Signature, k: int, point: Point) -> str:
    inner, outer = point
    source = draft.add("MatMul", ["x", draft.weight(f"a{k}", [_FEW, inner])], f"in{k}")
    made = draft.add("MatMul", [source, draft.weight(f"w{k}", [inner, outer])], f"n{k}")
    return draft.add("ReduceMax", [made], f"out{k}", keepdims=0)
