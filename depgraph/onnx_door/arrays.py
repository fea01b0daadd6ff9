"""Stored tensors as arrays, and as a mapping of torch tensors that are read when they are asked for."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from depgraph.onnx_door.folding import sizes_of

_OWN = 1 << 18
"""Bytes from which on numbers get memory of their own."""


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The numbers of a tensor. What lies beside the file is read from there, and gone when nobody holds the array."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8:
        with open(tensor.path, "rb") as opened:
            return numbers(opened, tensor.offset or 0, sizes_of(tensor), np.dtype(tensor.dtype.numpy()))
    return tensor.numpy()


def numbers(opened: BinaryIO, offset: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
    """The numbers of a file from a place on; raises ValueError where it ends before they do."""
    made = room(shape, kind)
    opened.seek(offset)
    if opened.readinto(made.reshape(-1).view(np.uint8)) != made.nbytes:  # type: ignore[attr-defined]
        raise ValueError("the file ends before its data does")
    return made


def room(shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
    """An array to be filled. Many numbers lie in memory of their own, which the process gives back when the array goes.

    Of what is freed of a heap, it keeps what lies before anything else.
    """
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    return np.empty(shape, kind) if size < _OWN else np.frombuffer(_space(size), kind).reshape(shape)


def _space(size: int) -> mmap.mmap:
    """Memory from the system itself, in large pages where it has such."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        made.madvise(mmap.MADV_HUGEPAGE)
    return made


def taken(array: np.ndarray, indices: Sequence[np.ndarray | None]) -> np.ndarray:
    """Some indices of each dim, None for all: the array itself, or one in the order of its dims."""
    for d, kept in enumerate(indices):
        if kept is not None:
            made = room((*array.shape[:d], len(kept), *array.shape[d + 1 :]), array.dtype)
            array = array.take(kept, axis=d, out=made, mode="clip")
    return array


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor that nobody writes to; numbers that torch can't add up as floats."""
    if array.dtype.kind not in "fiub" or (array.dtype.kind in "iu" and array.dtype.itemsize < 4):
        array = array.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name, read each time they are asked for, so that only those in use take memory."""

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]) -> None:
        self.names = dict.fromkeys(names)
        self.read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return as_torch(self.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def only(self, names: Iterable[str]) -> Weights:
        """Some of them."""
        return Weights(names, self.read)
