"""Single ONNX operators, carried out on small known tensors or asked for the shapes of their results."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

Known = np.ndarray
Type = onnx.TypeProto

_LARGEST_INTEGERS, _LARGEST_FLOATS = 1 << 20, 64
_DRAWN = frozenset(
    ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"]
)


def is_small(shape: Sequence[int], dtype: ir.DataType) -> bool:
    """Is a tensor one whose numbers may be shapes, indices or settings, so that they are worth knowing?"""
    count = int(np.prod(shape, dtype=np.int64))
    whole = dtype.is_integer() or dtype == ir.DataType.BOOL
    return (
        dtype.bitwidth >= 8
        and dtype != ir.DataType.STRING
        and count <= (_LARGEST_INTEGERS if whole else _LARGEST_FLOATS)
    )


def tensor_type(dtype: int, shape: Sequence[int | None]) -> Type:
    """A tensor type; None stands for a size that isn't known."""
    return onnx.helper.make_tensor_type_proto(dtype, list(shape))


def is_closed(shape: ir.Shape | None) -> bool:
    """Does a declared shape give all sizes? Some exporters write -1 for one that is open."""
    return shape is not None and all(isinstance(size, int) and size > 0 for size in shape)


def sizes_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a stored tensor."""
    return tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]


def shape_of(kind: Type | None) -> tuple[int, ...] | None:
    """The shape that a type gives; None where it isn't a tensor, or a size of it isn't known."""
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def schema_of(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """The schema of an operator; None where onnx doesn't know it."""
    return _schema(node.op_type, opset, "" if node.domain == "ai.onnx" else node.domain)


@functools.cache
def _schema(name: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(name, opset, domain)
    except (onnx.defs.SchemaError, TypeError):  # a version may be no number that fits
        return None


def inferred(
    node: onnx.NodeProto, schema: onnx.defs.OpSchema, types: Mapping[str, Type], known: Mapping[str, Known], opsets: Any
) -> dict[str, Type]:
    """The types of an operator's results, by onnx's own inference.

    Raises onnx.shape_inference.InferenceError (or RuntimeError) where shapes don't fit together.
    """
    data = {name: onnx.numpy_helper.from_array(array) for name, array in known.items()}
    return onnx.shape_inference.infer_node_outputs(schema, node, dict(types), data, opset_imports=opsets)


def carried_out(node: onnx.NodeProto, known: Mapping[str, Known], opsets: Mapping[str, int]) -> list[Known] | None:
    """What an operator makes of known tensors; None where that can't be said."""
    if node.op_type in _DRAWN:
        return None
    given = [onnx.helper.make_value_info(name, _type_of(array)) for name, array in known.items()]
    results = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "one", given, results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets.items()])
    try:
        made = ReferenceEvaluator(model).run(None, dict(known))
    except Exception:  # the reference knows fewer operators and types than runtimes do
        return None
    return [np.asarray(one) for one in made] if all(_is_array(one) for one in made) else None


def _is_array(made: Any) -> bool:
    return isinstance(made, (np.ndarray, np.generic)) and np.asarray(made).dtype.kind in "biuf"


def _type_of(array: Known) -> Type:
    return tensor_type(onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
