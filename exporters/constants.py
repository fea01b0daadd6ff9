"""While a forward is exported, the values of the constants that its code holds, and of what it computes from these alone.

torch.export takes every tensor for one of unknown values, also a list of strides that a module keeps in a plain tensor, and gives up
where the code asks for a number of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

_ASKS = frozenset(["__float__", "__int__", "__bool__", "__index__", "__complex__", "item", "tolist"])
_TAKES_NUMBERS = frozenset(["full", "new_full", "full_like", "arange", "linspace", "logspace"])
_LARGEST = 250  # numbers in a tensor that is followed


class ConstantsKnown(TorchFunctionMode):
    """Answers with the values of constants where the code asks for them; what tensors are computed is left as it is.

    A constant is a tensor that is neither a parameter, nor a buffer, nor computed from the inputs: these have no data then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function, or answer for it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _TAKES_NUMBERS:
            args, kwargs = pytree.tree_map_only(Tensor, self._number, (args, kwargs))
        if _writes(name):
            self.known |= {id(tensor): (tensor, None) for tensor in _tensors((args, kwargs))}
        values = self._values(args, kwargs)
        if values is None:
            return func(*args, **kwargs)
        with _disable_current_modes():
            value = func(*values[0], **values[1])
        if name in _ASKS:
            return value
        made = func(*args, **kwargs)
        for tensor, known in zip(_tensors(made), _tensors(value), strict=False):
            if tensor.shape == known.shape and known.numel() <= _LARGEST:
                self.known[id(tensor)] = tensor, known
        return made

    def _values(self, args: Any, kwargs: Any) -> Any:
        """The arguments with values; None where those of a tensor aren't known, or there is no tensor."""
        given = list(_tensors((args, kwargs)))
        if not given or any(self._value(tensor) is None for tensor in given):
            return None
        return pytree.tree_map_only(Tensor, self._value, (args, kwargs))

    def _value(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor that has them, or is known."""
        if id(tensor) in self.known:
            return self.known[id(tensor)][1]
        with torch._C.DisableTorchFunction():
            has = type(tensor) is Tensor and tensor.device.type != "meta" and tensor.numel() <= _LARGEST
        return tensor if has else None

    def _number(self, tensor: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            value = self._value(tensor) if tensor.ndim == 0 else None
            with _disable_current_modes():
                return tensor if value is None else value.item()


def _tensors(item: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(item) if isinstance(leaf, Tensor))


def _writes(name: str) -> bool:
    """Does a function change a tensor, or set something of it?"""
    if name.startswith("__"):
        return name in ("__set__", "__setitem__") or name.startswith("__i") and name not in (*_ASKS, "__invert__")
    return name.endswith("_")
