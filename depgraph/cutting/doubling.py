"""All floating-point numbers computed in double precision, whatever precision the weights have.

A deep model may make so much of rounding that two computations of the same thing in single precision differ visibly. In double
precision they don't, and what differs there is another computation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.capture.proxies import no_flags

_DOUBLE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
OF_TOLERANCE = 0.1  # of what may differ in the model's own precision, in which weights are rounded: what may in double
_OF_DATA = frozenset(["tensor", "as_tensor", "asarray", "Tensor", "FloatTensor"])
_LEFT = frozenset(["__set__", "__setitem__", "detach", "size", "dim"])


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Operators that run within take floating-point tensors as double ones, and make double ones.

    Numbers in the code that become a tensor are rounded as they are outside: so they stand in a captured program.
    """
    with _by_default(torch.float64) as before, _Given(before), _Made():
        yield


@contextlib.contextmanager
def alone_in_double() -> Iterator[None]:
    """`in_double` for a model that isn't told that it is captured."""
    with in_double(), no_flags():
        yield


@contextlib.contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Make `dtype` the one that floating-point tensors have where the code doesn't say; gives the one before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield before
    finally:
        torch.set_default_dtype(before)


class _Given(TorchFunctionMode):
    """Hands tensors over as double ones: some functions compare the precisions of what they are given first."""

    def __init__(self, usual: torch.dtype) -> None:
        super().__init__()
        self.usual = usual

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function, unless it writes to a tensor or only reads what one is like."""
        name = getattr(func, "__name__", "")
        if name == "__get__":  # recurrent layers compare their weights' precision with that of what comes in
            found = func(*args, **(kwargs or {}))
            return _doubled_type(found) if isinstance(args[0], nn.Parameter) else found
        if name in _OF_DATA:
            with _by_default(self.usual):
                return func(*args, **(kwargs or {}))
        if name in _LEFT or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
            return func(*args, **(kwargs or {}))
        given = pytree.tree_map(_doubled, (args, kwargs or {}))
        return func(*given[0], **given[1])


class _Made(TorchDispatchMode):
    """Makes double ones within functions too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; a tensor that it writes to keeps its precision."""
        if func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        given = pytree.tree_map(_doubled, (args, kwargs or {}))
        return func(*given[0], **given[1])


def _doubled_type(found: Any) -> Any:
    return _DOUBLE.get(found, found) if isinstance(found, torch.dtype) else found


def _doubled(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return _doubled_type(leaf)
    if isinstance(leaf, torch.Tensor) and leaf.dtype in _DOUBLE:
        return leaf.to(_DOUBLE[leaf.dtype])
    return leaf
