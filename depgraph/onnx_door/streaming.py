"""Writing an ONNX file a tensor at a time: protobuf itself would hold all weights twice more, as messages and as bytes.

In protobuf's encoding a message within another one is a tag, its length and its bytes, in any order of the fields. So all but the
initializers is encoded by protobuf, and each of these follows with the bytes that its tensor has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.serde import serialize_tensor

from depgraph.onnx_door.reading import varint

_BYTES = 2  # the wire type of what has a length
_SMALL = 1024


@dataclass(frozen=True)
class _Part:
    """An initializer: the bytes of its message, and the tensor whose data ends it (None: it has all)."""

    head: bytes
    tensor: ir.TensorProtocol | None = None

    @property
    def prefix(self) -> bytes:
        """What comes between the head and the data."""
        return b"" if self.tensor is None else _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, self.tensor.nbytes)

    @property
    def length(self) -> int:
        return len(self.head) + len(self.prefix) + (0 if self.tensor is None else self.tensor.nbytes)


def stream(model: ir.Model, file: BinaryIO) -> None:
    """Write a model, which loses its weights meanwhile, with all of them in the file."""
    held = [value for value in model.graph.initializers.values() if value.const_value is not None]
    parts = [_part(value) for value in held]
    for value in held:
        value.const_value = ir.Tensor(np.zeros(0, np.float32), name=value.name)
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    tags = [_field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, part.length) for part in parts]
    length = len(graph) + sum(len(tag) + part.length for tag, part in zip(tags, parts, strict=True))
    file.write(proto.SerializeToString() + _field(onnx.ModelProto.GRAPH_FIELD_NUMBER, length) + graph)
    for tag, part in zip(tags, parts, strict=True):
        file.write(tag + part.head + part.prefix)
        if part.tensor is not None:
            start = file.tell()
            _write(part.tensor, file)
            assert file.tell() - start == part.tensor.nbytes


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    """Write the bytes of a tensor, not put together before where it can do that itself."""
    if isinstance(tensor, (ir.Tensor, ir.LazyTensor)):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())


def _part(value: ir.Value) -> _Part:
    tensor = value.const_value
    assert tensor is not None
    tensor.name = value.name
    listed = isinstance(tensor, ir.TensorProtoTensor) and not tensor.raw.HasField("raw_data")
    packed = tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8
    if listed or packed or tensor.nbytes < _SMALL:
        return _Part(serialize_tensor(tensor).SerializeToString())
    head = onnx.TensorProto(name=value.name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    if tensor.doc_string:
        head.doc_string = tensor.doc_string
    for key, text in tensor.metadata_props.items():
        head.metadata_props.add(key=key, value=text)
    return _Part(head.SerializeToString(), tensor)


def _field(number: int, length: int) -> bytes:
    """The tag and the length of a field."""
    return varint(number << 3 | _BYTES) + varint(length)
