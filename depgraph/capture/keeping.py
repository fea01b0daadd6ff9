"""Memory kept as it was: just before an operator first writes to a held tensor's memory, what that holds is copied.

A forward may write to the tensors of its model and to its inputs: running statistics, a teacher that follows its student, a
mask multiplied into a weight. Each write passes torch's dispatcher, through views and `.data` too, so that only what is
written to is ever copied; `.data` that is replaced is put back by `restored`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.capture.proxies import storage_key
from depgraph.capture.restoring import restored

_STATISTICS = frozenset(["running_mean", "running_var"])  # written to by operators that don't declare it
_TRAINING = frozenset(["training", "use_input_stats"])
_HANDED_OVER = frozenset([Tensor.numpy, Tensor.__array__, Tensor.__dlpack__])  # others may write there, unseen


class Written(TorchDispatchMode):
    """Copies of the memory of certain tensors as it was before operators wrote to it, while this mode is on."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = {storage_key(t): t.untyped_storage() for t in tensors if not t.is_meta}
        self._before: dict[int, torch.UntypedStorage] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code that compiles itself, as flex attention does, may do so within."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no wrapper around every call: nothing here is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        for tensor in written_by(func, args, kwargs):
            self.keep(tensor)
        return func(*args, **kwargs)

    def keep(self, tensor: Tensor) -> None:
        """Copy its memory if it is held, and not copied yet."""
        if tensor.layout is not torch.strided or tensor.is_meta:
            return
        key = storage_key(tensor)
        if key in self._held and key not in self._before:
            self._before[key] = self._held[key].clone()

    def own(self, value: Any) -> Any:
        """A tensor whose memory will be put back as a copy of its own; anything else as it is."""
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        return value.clone() if storage_key(value) in self._before else value

    def put_back(self) -> None:
        """Let all memory hold again what it held."""
        for key, before in self._before.items():
            storage = self._held[key]
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before)


class _HandedOver(TorchFunctionMode):
    """Copies memory that is handed over as an array, in which others may write."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self.written = written

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        if func in _HANDED_OVER:
            self.written.keep(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def unwritten(model: nn.Module, *inputs: Any) -> Iterator[Written]:
    """As `restored`; and all tensors that `model` and its `inputs` hold, hold the same values afterwards."""
    with put_back(model, *inputs) as written, written, _HandedOver(written):
        yield written


@contextmanager
def put_back(model: nn.Module, *inputs: Any) -> Iterator[Written]:
    """As `unwritten`, for what is written while the mode that it gives is on: backward passes are faster without."""
    with restored(model, *inputs) as held:
        written = Written(held)
        try:
            yield written
        finally:
            written.put_back()


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to; of a higher-order operator all that it is given."""
    known = isinstance(func, torch._ops.OpOverload)
    given: Any = written_arguments(func, args, kwargs) if known else (args, kwargs)
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)] if given else []


def written_arguments(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an operator is given to write to: all that it declares, but running statistics in training only."""
    declared, statistics, training = _places(func)
    if not declared and not statistics:
        return []
    if statistics and _argument(training, args, kwargs):
        declared += statistics
    return [_argument(place, args, kwargs) for place in declared]


_Place = tuple[int, str]
_NEVER: _Place = (sys.maxsize, "")


def _argument(place: _Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    at, name = place
    return args[at] if at < len(args) else kwargs.get(name)


@cache
def _places(func: torch._ops.OpOverload) -> tuple[tuple[_Place, ...], tuple[_Place, ...], _Place]:
    """Position and name of what an operator always writes to, of its running statistics, and of what says that it trains.

    Statistics are written to in training, also by operators that don't declare it; some that do have no such argument.
    """
    given = list(enumerate(func._schema.arguments))
    training = next(((k, a.name) for k, a in given if a.name in _TRAINING), _NEVER)
    written = [(k, a.name) for k, a in given if a.alias_info is not None and a.alias_info.is_write]
    statistics = [(k, a.name) for k, a in given if a.name in _STATISTICS] if training is not _NEVER else []
    return tuple(place for place in written if place not in statistics), tuple(statistics), training
