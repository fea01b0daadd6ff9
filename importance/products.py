"""Linear maps and convolutions as a model calls them: which weight, which rows come in, and which gradients come back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from depgraph.capture.proxies import function_mode_stack_kept, open_functionals


@dataclass(frozen=True)
class Product:
    """One call of a linear map with a `parameter` as its weight: what was `given`, and what was `made` of it.

    `weight` is the parameter as [groups, rows, columns]: a convolution's columns are the channels of one group times its window;
    everything else has one group. `transposed` says that the parameter has its columns along dim 0, `laid_out` makes rows of
    columns of what was given, and `channels` is the dim of the rows in what was made.
    """

    parameter: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    given: Tensor
    made: Tensor
    laid_out: Callable[[Tensor], Tensor] = lambda x: x
    channels: int = -1

    @property
    def inputs(self) -> Tensor:
        """What came in, [..., groups * columns]."""
        return self.laid_out(self.given.detach())


class Watching(TorchFunctionMode):
    """Gives every product with one of the `wanted` parameters to `seen`, while this mode is on."""

    def __init__(self, wanted: Mapping[int, Any], seen: Callable[[Product], None]) -> None:
        super().__init__()
        self.wanted, self.seen = wanted, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        made = func(*args, **(kwargs or {}))
        read = _PRODUCTS.get(func)
        if read is not None and isinstance(made, Tensor):
            product = read(self, made, args, dict(kwargs or {}))
            if product is not None:
                self.seen(product)
        return made

    def parameter(self, weight: Any) -> tuple[Tensor, bool] | None:
        """The wanted parameter that a weight is, and whether it is its transpose."""
        if not isinstance(weight, Tensor):
            return None
        if id(weight) in self.wanted:
            return weight, False
        base = weight._base
        if base is None or id(base) not in self.wanted or weight.storage_offset() != base.storage_offset():
            return None
        turned = weight.ndim == 2 and weight.shape == base.shape[::-1] and weight.stride() == base.stride()[::-1]
        return (base, True) if turned else None


@contextlib.contextmanager
def watching(wanted: Mapping[int, Any], seen: Callable[[Product], None]) -> Iterator[None]:
    """`Watching`, also inside of what torch has written in Python, as multi-head attention is."""
    with function_mode_stack_kept(), open_functionals(), Watching(wanted, seen):
        yield


def _linear(mode: Watching, made: Tensor, args: Any, kwargs: Any) -> Product | None:
    """x W' + b."""
    x, weight, bias = _bound(("input", "weight", "bias"), args, kwargs)
    found = mode.parameter(weight)
    if found is None or weight.ndim != 2:
        return None
    return Product(found[0], weight.detach()[None], bias, found[1], x, made)


def _matmul(mode: Watching, made: Tensor, args: Any, kwargs: Any) -> Product | None:
    """x V: V has its columns along dim 0."""
    x, weight = _bound(("input", "other"), args, kwargs)
    return _turned(mode, x, weight, None, made)


def _addmm(mode: Watching, made: Tensor, args: Any, kwargs: Any) -> Product | None:
    """b + x V."""
    bias, x, weight = _bound(("input", "mat1", "mat2"), args, kwargs)
    scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
    return None if scaled or bias.ndim > 1 else _turned(mode, x, weight, bias, made)


def _turned(mode: Watching, x: Any, weight: Any, bias: Any, made: Tensor) -> Product | None:
    found = mode.parameter(weight)
    if found is None or weight.ndim != 2 or not isinstance(x, Tensor):
        return None
    return Product(found[0], weight.detach().T[None], bias, not found[1], x, made)


def _convolution(mode: Watching, made: Tensor, args: Any, kwargs: Any) -> Product | None:
    """A one- or two-dimensional convolution, its windows laid out as columns group by group."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _bound(names, args, kwargs, (None, 1, 0, 1, 1))
    found, space = mode.parameter(weight), made.ndim - 2
    if found is None or weight.ndim not in (3, 4) or made.ndim != weight.ndim:
        return None
    window = tuple(weight.shape[2:])
    stride, dilation = _each(stride, space), _each(dilation, space)
    pads = _padding(padding, window, dilation)

    def windows(x: Tensor) -> Tensor:
        padded = F.pad(x, pads)
        planes, size, step, apart = padded, window, stride, dilation
        if space == 1:
            planes, size, step, apart = padded.unsqueeze(2), (1, *window), (1, *stride), (1, *dilation)
        return F.unfold(planes, size, dilation=apart, stride=step).transpose(1, 2)

    rows = weight.detach().reshape(groups, weight.shape[0] // groups, -1)
    return Product(found[0], rows, bias, False, x, made, windows, channels=1)


def _padding(padding: Any, window: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """What F.pad adds, last dim first."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (w - 1) for d, w in zip(dilation, window, strict=True)]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return [p for p in reversed(_each(padding, len(window))) for _ in range(2)]


def _each(value: Any, space: int) -> tuple[int, ...]:
    given = tuple(value) if isinstance(value, tuple | list) else (value,)
    return given * space if len(given) == 1 else given


def _bound(names: tuple[str, ...], args: Any, kwargs: Any, defaults: tuple[Any, ...] = (None,)) -> tuple[Any, ...]:
    """Arguments in the order of their names; the last have `defaults`."""
    otherwise = dict(zip(names[-len(defaults) :], defaults, strict=True))
    return tuple(args[k] if k < len(args) else kwargs.get(n, otherwise.get(n)) for k, n in enumerate(names))


_PRODUCTS: dict[Any, Callable[[Watching, Tensor, Any, Any], Product | None]] = {
    F.linear: _linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    **dict.fromkeys([torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__], _matmul),
}
