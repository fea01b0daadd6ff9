"""Views by strides (`as_strided`) while a model is exported: a file knows no strides, and takes what they are of as laid out in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BY_STRIDES = (Tensor.as_strided, torch.as_strided, torch.ops.aten.as_strided, torch.ops.aten.as_strided.default)


class InMemoryOrder(TorchFunctionMode):
    """Takes views by strides of tensors whose dims are in the order of their memory, by permuting these first.

    The view is the same one. Memory that no order of dims runs through without a gap (of slices, of what is expanded) stays as
    it is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _BY_STRIDES and args and isinstance(args[0], Tensor):
            args = (_in_order(args[0]), *args[1:])
        return func(*args, **kwargs)


def _in_order(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    strides = tensor.stride()
    permuted = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: strides[dim], reverse=True))
    return permuted if permuted.is_contiguous() else tensor
