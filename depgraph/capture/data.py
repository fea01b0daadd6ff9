"""`.data` and deep copies by operators: torch reads and replaces memory past its dispatcher, where a capture doesn't see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from depgraph.capture.frames import where
from depgraph.capture.hooking import while_running
from depgraph.errors import CaptureError


class Rebound(CaptureError):
    """The forward gives a tensor memory that a graph can't give it."""


def check_memory_stays(func: Any) -> None:
    """Raise Rebound for an operator that gives a tensor other memory."""
    if getattr(func, "overloadpacket", None) is torch.ops.aten.set_:
        raise Rebound(
            f"at {where()} the forward gives a tensor other memory ({func}), which can't be captured: copy into it with "
            "copy_ there, or take that out of the forward"
        )


def check_strides(func: Any, made: Any) -> None:
    """Raise Rebound for an operator that makes a tensor without strides: a graph's tensors have shapes that a cut narrows."""
    if any(isinstance(one, Tensor) and one.layout is not torch.strided for one in pytree.tree_leaves(made)):
        raise Rebound(
            f"at {where()} the forward makes a sparse tensor ({func}), which can't be captured: make it outside of the forward and "
            "hold it as a buffer, or write that with dense tensors"
        )


class DataByOperators(TorchFunctionMode):
    """Within, `tensor.data` is `tensor.detach()`, `tensor.data = value` copies `value` into the tensor's memory, a deep copy is a clone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        return BY_OPERATORS.get(func, func)(*args, **(kwargs or {}))


def data_by_operators(model: nn.Module) -> AbstractContextManager[None]:
    """`DataByOperators` while `model` runs within."""
    return while_running(model, DataByOperators)


def _replace(tensor: Tensor, value: Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
        raise Rebound(
            f"at {where()} the data of a {tensor.dtype} tensor of shape {tuple(tensor.shape)} is replaced by a {value.dtype} "
            f"one of shape {tuple(value.shape)}, which can't be captured: take that out of the forward"
        )
    tensor.detach().copy_(value)


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """As `copy.deepcopy` of a tensor, which takes its memory apart."""
    if not tensor.is_leaf:
        return tensor.__deepcopy__(memo)  # type: ignore[no-any-return]  # torch refuses
    return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))  # type: ignore[no-any-return]


BY_OPERATORS: dict[Any, Callable[..., Any]] = {
    Tensor.data.__get__: Tensor.detach,  # type: ignore[attr-defined]
    Tensor.data.__set__: _replace,  # type: ignore[attr-defined]
    Tensor.__deepcopy__: _copied,
}
