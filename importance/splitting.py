"""Batches split into their samples: what per-sample gradients are taken of."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from depgraph.errors import DataError
from importance.calling import each_tensor


def sample_count(batch: Any) -> int:
    """How many samples a batch has: the largest leading size of its tensors, 1 where none has a dim."""
    return max(_leading_sizes(batch), default=1)


def samples_of(batch: Any) -> list[Any]:
    """The samples of a batch as batches of one, in the batch's own form.

    All tensors are split along dim 0. Those that are scalars, or of size 1 there, belong to every sample, as does what is no
    tensor. A batch without tensors of one dim or more is a single sample.

    Raises DataError when there is no sample in the batch, or when its tensors differ in their leading size.
    """
    sizes = _leading_sizes(batch)
    count = max(sizes, default=1)
    if 0 in sizes:
        raise DataError("a batch has no samples (a tensor of leading size 0): leave it out")
    if sizes - {1, count}:
        found = ", ".join(map(str, sorted(sizes)))
        raise DataError(
            f"a batch can't be split into samples, as its tensors have leading sizes {found}: give batches of one sample "
            "each, or put the samples along the first dim of every tensor"
        )
    if count == 1:
        return [batch]
    return [each_tensor(batch, partial(_sample, number=k, count=count)) for k in range(count)]


def _sample(tensor: Tensor, number: int, count: int) -> Tensor:
    return tensor[number : number + 1] if tensor.ndim and len(tensor) == count else tensor


def _leading_sizes(batch: Any) -> set[int]:
    sizes: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        sizes.update(tensor.shape[:1])
        return tensor

    each_tensor(batch, note)
    return sizes
