"""Integers that the code puts into a tensor and takes out again, as in `n = torch.IntTensor([self.width])` and `x[:, : n[0]]`.

What comes out is the number that went in, which remembers the size it came from; nothing is decided by a value of a
tensor then. A tensor that is computed with, written to, or looked at in a way not listed here isn't followed any further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_MOST = 16
_MAKERS = frozenset({torch.tensor, torch.as_tensor})
_LEGACY = ("ByteTensor", "CharTensor", "ShortTensor", "IntTensor", "LongTensor")
_INDEXING = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_COPIES = frozenset({Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.int, Tensor.long, Tensor.clone, Tensor.detach})
_ABOUT = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}


class _Box(NamedTuple):
    """A tensor that is kept alive, its number or numbers, and which tensors share its memory (by the first one's id)."""

    tensor: Tensor
    held: Any
    root: int


class Boxes(TorchFunctionMode):
    """Knows which tensors hold which numbers of the code's, and hands these out in the tensors' place."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: dict[int, _Box] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, with numbers for bounds of slices that were taken out of a box."""
        kwargs = kwargs or {}
        if func is Tensor.type and len(args) > 1 and isinstance(args[1], _Legacy):
            args = (args[0], args[1].original, *args[2:])
        if func in _MAKERS:
            return self.put(func(*args, **kwargs), args[0] if args else kwargs.get("data"))
        if not self.boxes or func in _ABOUT:
            return func(*args, **kwargs)
        if func in _INDEXING and type(args[0]) is not tuple:
            args = (args[0], self._unpacked(args[1]), *args[2:])
        box = self.boxes.get(id(args[0])) if args else None
        if box is not None and (reader := _READERS.get(func)) is not None:
            return reader(box.held)
        result = func(*args, **kwargs)
        if box is not None and func is Tensor.__getitem__ and type(args[1]) is int and type(box.held) is tuple:
            self._add(result, box.held[args[1]], box.root)
        elif box is not None and func in _COPIES:
            self.put(result, box.held)
        else:
            self._open((args, kwargs))
        return result

    def put(self, made: Any, given: Any) -> Any:
        """`made`, a tensor of the numbers `given`, from now on known to hold them if they are few integers."""
        held = tuple(given) if isinstance(given, (list, tuple)) else given
        numbers = held if type(held) is tuple else (held,)
        if len(numbers) <= _MOST and all(_is_integer(n) for n in numbers) and not made.is_floating_point():
            self._add(made, held, id(made))
        return made

    def _add(self, tensor: Tensor, held: Any, root: int) -> None:
        self.boxes[id(tensor)] = _Box(tensor, held, root)

    def _unpacked(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._unpacked(one) for one in index)
        if isinstance(index, slice):
            return slice(*(self._number(bound) for bound in (index.start, index.stop, index.step)))
        return index

    def _number(self, bound: Any) -> Any:
        box = self.boxes.get(id(bound))
        return bound if box is None or type(box.held) is tuple else box.held

    def _open(self, arguments: Any) -> None:
        """Forget what the tensors among `arguments` hold, and those that share their memory: they may be written to."""
        roots = {self.boxes[id(leaf)].root for leaf in pytree.tree_leaves(arguments) if id(leaf) in self.boxes}
        if roots:
            self.boxes = {key: box for key, box in self.boxes.items() if box.root not in roots}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(held: Any) -> Any:
    return list(held) if type(held) is tuple else held


def _one(held: Any) -> Any:
    (number,) = held if type(held) is tuple else (held,)
    return number


_READERS: dict[Any, Callable[[Any], Any]] = {
    Tensor.item: _one,
    Tensor.tolist: _listed,
    Tensor.__int__: lambda held: int(_one(held)),
    Tensor.__index__: lambda held: int(_one(held)),
}


class _Legacy(type):
    """Stands for a class such as `torch.IntTensor`, whose calls torch shows to nobody."""

    original: Any
    boxes: Boxes

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = cls.original(*args, **kwargs)
        return cls.boxes.put(made, args[0]) if len(args) == 1 and isinstance(args[0], (list, tuple)) else made

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)


@contextmanager
def boxed() -> Iterator[None]:
    """Within, numbers that are put into tensors by the code come out as themselves."""
    boxes = Boxes()
    with ExitStack() as inside:
        for name in _LEGACY:
            original = getattr(torch, name)
            inside.callback(setattr, torch, name, original)
            setattr(torch, name, _Legacy(name, (), {"original": original, "boxes": boxes}))
        inside.enter_context(boxes)
        yield
