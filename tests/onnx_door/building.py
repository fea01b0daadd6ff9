"""Small ONNX models written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def value(name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """A declared value."""
    return helper.make_tensor_value_info(name, kind, list(shape))


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """An operator; names apart by blanks, ``-`` for one that is left out."""
    given, made = ([n.replace("-", "") for n in names.split()] for names in (inputs, outputs))
    return helper.make_node(kind, given, made, **attributes)


def weights(**shapes: Sequence[int]) -> list[onnx.TensorProto]:
    """Initializers of normal numbers, a little smaller the more of them are added up."""
    generator = np.random.default_rng(3)
    arrays = {
        n: generator.standard_normal(s).astype(np.float32) / max(np.prod(s[1:]), 1) ** 0.5 for n, s in shapes.items()
    }
    return [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]


def whole(name: str, *numbers: int) -> onnx.TensorProto:
    """An initializer of whole numbers."""
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    held: Sequence[onnx.TensorProto] = (),
    opset: int = 17,
    **more: Any,
) -> onnx.ModelProto:
    """A model of these operators."""
    domains = sorted({n.domain for n in nodes} - {""})
    graph = helper.make_graph(
        list(nodes), "built", list(inputs), list(outputs), list(held), value_info=more.pop("values", [])
    )
    sets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=sets, ir_version=more.pop("ir_version", 10), **more)


def mlp() -> onnx.ModelProto:
    """x [n, 6] -> hidden 16 -> y [n, 3]."""
    nodes = [node("Gemm", "x w b", "h", transB=1), node("Relu", "h", "r"), node("Gemm", "r v c", "y", transB=1)]
    held = weights(w=(16, 6), b=(16,), v=(3, 16), c=(3,))
    return model(nodes, [value("x", ["n", 6])], [value("y", ["n", 3])], held)


def loaded(proto: onnx.ModelProto) -> ir.Model:
    """As the library takes it."""
    return ir.from_proto(proto)
