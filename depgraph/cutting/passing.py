"""What stands where a sublayer was: nothing, which disappears in the addition that joined it with the stream.

A `Passed` module returns `Nothing` in the layout of what was there. Every torch function of it is nothing again, without being
computed, and a stream plus nothing is the stream itself: no zeros, no product, no addition are left, also not in an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

Layout = Any
"""JSON-able: {"nothing": sizes} with None for a size of the module's input, {"given": name} for an argument by its name or place,
None for anything else, or {"tuple": [...]}, {"list": [...]}, {"dict": {...}} of such."""

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_TO_THE_FIRST = frozenset({"sub", "sub_", "__sub__", "__isub__", "addcmul", "addcmul_", "addmm", "baddbmm"})
_SEVERAL = frozenset({"chunk", "split", "split_with_sizes", "unbind", "tensor_split", "topk", "sort", "max", "min"}) | {
    "size",
    "dim",
    "numel",
    "stride",
}
_SHAPE = frozenset(["shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "is_nested", "layout"])


class Nothing:
    """No tensor, in the place of one whose shape `outline` tells: a function that makes a tensor of it on the meta device.

    It is called when code asks for the shape, and raises ValueError where that isn't known. `place` is the device that the
    tensor would be on: code makes others there.
    """

    def __init__(self, outline: Callable[[], torch.Tensor], place: torch.device | None = None) -> None:
        self._outline = outline
        self._place = place

    @property
    def outline(self) -> torch.Tensor:
        """A tensor of the shape, on the meta device."""
        with torch._C.DisableTorchFunction(), torch.no_grad():  # who watches torch calls isn't shown this
            return self._outline()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing, of the shape that `func` gives, unless it adds it to a tensor, which goes on alone."""
        name = getattr(func, "__name__", "")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if tensors and (name in _SUMS or name in _TO_THE_FIRST and tensors[0] is args[0]):
            return tensors[0]
        if tensors and name in _TO_THE_FIRST:
            raise TypeError(f"torch.{name} takes something from, or adds a product to, what is left out")

        def made() -> Any:
            return func(*_outlines(args), **_outlines(kwargs or {}))

        place = _place_of((args, kwargs))
        if name not in _SEVERAL:
            return Nothing(made, place)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return pytree.tree_map(lambda t: of(t, place) if isinstance(t, torch.Tensor) else t, made())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "device" and self._place is not None:
            return self._place
        if name in _SHAPE:
            try:
                return getattr(self.outline, name)
            except ValueError as error:
                raise AttributeError(name) from error
        return partial(self._call, name)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return Nothing.__torch_function__(getattr(torch.Tensor, name), (), (self, *args), kwargs)

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    def __fx_create_arg__(self, tracer: Any) -> int:
        """A zero to add, where torch.fx traces symbols: they are no tensors, which would go on alone."""
        return 0

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, (int, float)) else other

    __rsub__ = __radd__


def of(outline: torch.Tensor, place: torch.device | None = None) -> Nothing:
    """Nothing of the shape of a tensor on the meta device."""
    return Nothing(lambda: outline, place)


def blank_like(tensor: torch.Tensor | None) -> Nothing:
    """Nothing of the shape and type of a tensor; unlike others it can be pickled."""
    if tensor is None:
        raise AttributeError("there is no such parameter")
    return Nothing(partial(torch.empty, tensor.shape, dtype=tensor.dtype, device="meta"))


def _place_of(given: Any) -> torch.device | None:
    """The device of the first thing that lies on one."""
    for leaf in pytree.tree_leaves(given, is_leaf=lambda value: isinstance(value, Nothing)):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
        if isinstance(leaf, Nothing) and leaf._place is not None:
            return leaf._place
    return None


def _unknown() -> torch.Tensor:
    raise ValueError("no shape is known")


def _operation(name: str) -> Any:
    def operate(self: Nothing, *args: Any) -> Any:
        return self._call(name, *args)

    return operate


for _name in [
    "add",
    "iadd",
    "sub",
    "isub",
    "mul",
    "rmul",
    "imul",
    "truediv",
    "itruediv",
    "neg",
    "pow",
    "matmul",
    "getitem",
    "gt",
    "lt",
    "ge",
    "le",
]:
    setattr(Nothing, f"__{_name}__", _operation(f"__{_name}__"))


def _outlines(given: Any) -> Any:
    """Arguments with meta tensors in the place of tensors and of nothing."""

    def outline(value: Any) -> Any:
        if isinstance(value, Nothing):
            return value.outline
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return value

    return pytree.tree_map(outline, given, is_leaf=lambda value: isinstance(value, Nothing))


class Passed(nn.Module):
    """Stands for a module that was left out with a sublayer: it returns nothing, in the layout of the module's outputs.

    `plain` are the numbers and words that the module had, which code around it may look at; what else it `had` is nothing.
    With a `place`, it puts a number a token there in the cache that it is given, so that the cache knows how many there were.
    """

    def __init__(self, layout: Layout, plain: dict[str, Any], had: Iterable[str]) -> None:
        super().__init__()
        self.had = frozenset(had)
        self.layout = layout
        self.place: int | None = None
        for name, value in plain.items():
            self.__dict__.setdefault(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`Nothing`, of a shape like that of the first tensor that it is given."""
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, Nothing))
        given = next((leaf for leaf in leaves if isinstance(leaf, (torch.Tensor, Nothing))), Nothing(_unknown))
        if self.place is not None:
            _count(leaves, given, self.place)
        return _filled(self.layout, given, _by_name(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self.__dict__.get("had", ()):
                raise
            return Nothing(_unknown)

    def extra_repr(self) -> str:
        return "nothing, left out"


def passed(module: nn.Module, layout: Layout) -> Passed:
    """What stands for `module`."""
    plain = {n: v for n, v in vars(module).items() if type(v) in (int, float, bool, str) and not n.startswith("__")}
    stores = (module._parameters, module._buffers, module._modules, vars(module))
    return Passed(layout, plain, (name for store in stores for name in store if not name.startswith("_")))


def _count(arguments: list[Any], stream: Any, place: int) -> None:
    """Add the tokens of a stream [batch, tokens, features], or of nothing like it, to what a cache among the arguments holds."""
    outline = stream.outline if isinstance(stream, Nothing) else stream
    for cache in (getattr(argument, "self_attention_cache", argument) for argument in arguments):
        if callable(getattr(cache, "get_seq_length", None)) and callable(getattr(cache, "update", None)):
            token = torch.zeros(len(outline), 1, outline.shape[1], 1, dtype=outline.dtype, device=stream.device)
            cache.update(token, token, place)


_KINDS: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "list": list}


def _filled(layout: Layout, given: Any, arguments: Mapping[str, Any]) -> Any:
    if layout is None:
        return None
    ((kind, parts),) = layout.items()
    if kind == "nothing":
        return Nothing(lambda: _outline(parts, given), _place_of(given))
    if kind == "given":
        return arguments.get(parts)
    if kind == "dict":
        return {name: _filled(part, given, arguments) for name, part in parts.items()}
    return _KINDS[kind](_filled(part, given, arguments) for part in parts)


def _by_name(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names, or their places."""
    return {str(k): value for k, value in enumerate(args)} | dict(kwargs)


def _outline(sizes: list[int | None], given: Any) -> torch.Tensor:
    source = given.outline if isinstance(given, Nothing) else given
    if any(size is None and k >= source.ndim for k, size in enumerate(sizes)):
        return _unknown()
    shape = [source.shape[k] if size is None else size for k, size in enumerate(sizes)]
    return torch.empty(shape, dtype=source.dtype, device="meta")


def layout_of(output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
    """The layout of a module's outputs on some arguments: nothing in the place of the first tensor, None for all else.

    But arguments that it hands on are handed on.
    """
    arguments, taken = _by_name(args, kwargs), False
    given = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None)

    def lay(value: Any) -> Layout:
        nonlocal taken
        if isinstance(value, torch.Tensor):
            first, taken = not taken, True
            if first:
                return {"nothing": _sizes(value, given)}
            return next(({"given": name} for name, argument in arguments.items() if argument is value), None)
        if type(value) in (tuple, list):
            return {type(value).__name__: [lay(part) for part in value]}
        if isinstance(value, dict):
            return {"dict": {str(name): lay(part) for name, part in value.items()}}
        return None

    return lay(output)


def _sizes(value: torch.Tensor, given: Any) -> list[int | None]:
    source = given.shape if isinstance(given, torch.Tensor) else ()
    return [None if k < len(source) and source[k] == size else int(size) for k, size in enumerate(value.shape)]
