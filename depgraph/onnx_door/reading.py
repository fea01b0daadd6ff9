"""Reading an ONNX file without the numbers of its large tensors: these stay where they lie until they are asked for.

In protobuf's encoding a message is a row of fields, each with its number, and what is inside another message has its length
before it. So the data of a tensor is found without being read; to protobuf it is shown as data that lies in another file.
"""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from depgraph.errors import CaptureError, CheckpointError
from depgraph.onnx_door.arrays import numbers, room
from depgraph.onnx_door.folding import sizes_of

_LARGE = 1 << 12
"""Bytes from which on a tensor's numbers stay in the file."""
_LEADS = frozenset(["GraphProto", "FunctionProto", "NodeProto", "AttributeProto", "TensorProto"])
"""Messages that hold tensors, or others that do."""
_VARINT, _BYTES = 0, 2
_SIZES = {1: 8, 5: 4}
"""Bytes of fields of the wire types that always have as many."""
_HEAD = 20
"""Bytes that the number of a field and its length take at most."""


class _Field(NamedTuple):
    """Where a field starts, where what it holds does, and where it ends; `bytes` says that this is bytes, or a message."""

    number: int
    start: int
    inner: int
    end: int
    bytes: bool


class Source:
    """An open file that tensors are read from; also once another file has got its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._state, self._lock = self._now(), threading.Lock()

    def opened(self) -> BinaryIO:
        """The file, to be closed by who asks for it."""
        return os.fdopen(os.dup(self._descriptor), "rb")

    def read(self, offset: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        """Numbers from a place on; raises CheckpointError where somebody has written into the file meanwhile."""
        if self._now() != self._state:
            raise CheckpointError(f"{self.path} has been written to since it was read: trace it again")
        if not hasattr(os, "preadv"):
            with self._lock, self.opened() as opened:
                return numbers(opened, offset, shape, np.dtype(kind))
        made = room(shape, np.dtype(kind))
        space, done = made.reshape(-1).view(np.uint8), 0
        while done < made.nbytes:  # by place: forked processes share where a file was read to
            count = os.preadv(self._descriptor, [space[done:].data], offset + done)
            if not count:
                raise CheckpointError(f"{self.path} ends before its data does: copy it again")
            done += count
        return made

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


def read(path: Path) -> tuple[onnx.ModelProto, ir.Model]:
    """The message that a file holds, without the data of large tensors, and the model, whose tensors have it.

    Raises:
        OSError: the file can't be read.
        CaptureError: a tensor has more or less data than its shape says.
    """
    source, mark = Source(path), secrets.token_hex(16)
    try:
        with source.opened() as opened:
            whole = (0, path.stat().st_size)
            proto = onnx.ModelProto.FromString(_lean(opened, whole, onnx.ModelProto.DESCRIPTOR, mark))
    except ValueError:  # text, or damaged, of which protobuf knows more
        proto = onnx.load(path, load_external_data=False)
    model = ir.from_proto(proto)
    for graph in (*model.graphs(), *(g for f in model.functions.values() for g in (f.graph, *f.subgraphs()))):
        _restore(graph, source, mark)
    return proto, model


def _restore(graph: ir.Graph, source: Source, mark: str) -> None:
    """Let tensors whose data is marked as lying elsewhere read it from the file."""
    for value in graph.initializers.values():
        if _is_marked(value.const_value, mark):
            value.const_value = _lazy(value.const_value, source)
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.TENSOR and _is_marked(attr.value, mark):
                node.attributes[attr.name] = ir.AttrTensor(attr.name, _lazy(attr.value, source), attr.doc_string)
            elif attr.type == ir.AttributeType.TENSORS:
                several = [_lazy(t, source) if _is_marked(t, mark) else t for t in attr.value]
                node.attributes[attr.name] = ir.AttrTensors(attr.name, several, attr.doc_string)


def _is_marked(tensor: Any, mark: str) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == mark


def _lazy(tensor: Any, source: Source) -> ir.LazyTensor:
    """A tensor that reads its numbers anew each time."""
    name, dtype, shape, offset, length = tensor.name, tensor.dtype, sizes_of(tensor), tensor.offset, tensor.length
    if length != tensor.nbytes:
        raise CaptureError(
            f"{source.path.name}: {name!r} of shape {tensor.shape} has {length} bytes of data, not {tensor.nbytes}"
        )

    def whole() -> ir.TensorProtocol:
        return ir.Tensor(source.read(offset, shape, dtype.numpy()), dtype=dtype, name=name)

    def packed() -> ir.TensorProtocol:
        data = source.read(offset, (length,), np.uint8).tobytes()
        return ir.TensorProtoTensor(onnx.TensorProto(name=name, data_type=dtype.value, dims=shape, raw_data=data))

    return ir.LazyTensor(
        whole if dtype.bitwidth >= 8 else packed,
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _lean(file: BinaryIO, place: tuple[int, int], kind: Any, mark: str) -> bytes:
    """A message of a kind, with a note of where the data of large tensors lies in its place."""
    found = bytearray()
    for field in _fields(file, *place):
        inside = kind.fields_by_number.get(field.number) if field.bytes and field.end - field.inner >= _LARGE else None
        if inside is not None and inside.message_type is not None and inside.message_type.name in _LEADS:
            message = _lean(file, (field.inner, field.end), inside.message_type, mark)
            found += varint(field.number << 3 | _BYTES) + varint(len(message)) + message
        elif inside is not None and inside.full_name == "onnx.TensorProto.raw_data":
            found += _elsewhere(mark, field)
        else:
            file.seek(field.start)
            found += file.read(field.end - field.start)
    return bytes(found)


def _elsewhere(mark: str, field: _Field) -> bytes:
    """The fields of a tensor whose data lies in another file."""
    made = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", mark), ("offset", field.inner), ("length", field.end - field.inner)):
        made.external_data.add(key=key, value=str(value))
    return made.SerializeToString()


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[_Field]:
    """The fields of a message; raises ValueError where it is none."""
    while start < end:
        file.seek(start)
        head = file.read(_HEAD)
        tag, at = _number(head, 0)
        wire = tag & 7
        number, inner = _number(head, at) if wire in (_VARINT, _BYTES) else (0, at)
        if wire not in (_VARINT, _BYTES, *_SIZES):
            raise ValueError(f"there is no wire type {wire}")
        stop = start + inner + (number if wire == _BYTES else _SIZES.get(wire, 0))
        if stop > end:
            raise ValueError("a field ends after its message")
        yield _Field(tag >> 3, start, start + inner, stop, wire == _BYTES)
        start = stop


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A whole number of the encoding, and where it ends; raises ValueError where the data or the number doesn't."""
    found = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        found, at = found | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return found, at
    raise ValueError("a number without an end")


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the highest bit set."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
