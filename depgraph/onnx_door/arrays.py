"""Stored tensors as arrays, and as a mapping of torch tensors that are read when they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch

from depgraph.onnx_door.folding import sizes_of


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The numbers of a tensor. What lies beside the file is read from there, and gone when nobody holds the array."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8:
        shape = sizes_of(tensor)
        kind, count = np.dtype(tensor.dtype.numpy()), int(np.prod(shape, dtype=np.int64))
        return np.fromfile(tensor.path, dtype=kind, count=count, offset=tensor.offset or 0).reshape(shape)
    return tensor.numpy()


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
