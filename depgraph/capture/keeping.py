"""What a model's parameters and buffers hold, kept while its forward runs that may write to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.capture.proxies import storage_key
from depgraph.capture.restoring import restored


class Contents:
    """The parameters and buffers of a model hold the same numbers after this as before, if `keep` is told before each write.

    Only memory that is written to is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
        dense = (data for _, data in self._held if data.layout is torch.strided)
        self._storages = {storage_key(data): data.untyped_storage() for data in dense}
        self._copies: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are about to be written to."""
        for key in map(storage_key, tensors):
            if key in self._storages and key not in self._copies:
                self._copies[key] = self._storages[key].clone()

    def rebound(self) -> bool:
        """Has any been given other memory (`p.data = ...`)?"""
        return any(storage_key(tensor) != storage_key(data) for tensor, data in self._held)

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, *error: object) -> None:
        for key, copy in self._copies.items():
            self._storages[key].copy_(copy)


class _Watching(TorchDispatchMode):
    """Keeps what an operator is about to write to."""

    def __init__(self, contents: Contents) -> None:
        super().__init__()
        self.contents = contents

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        self.contents.keep(written(func, args))
        return func(*args, **(kwargs or {}))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever a forward of `model` does within, all that the model holds is as it was afterwards."""
    with restored(model), Contents(model) as contents, _Watching(contents):
        yield


def written(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among positional arguments that the operator writes to."""
    pairs = zip(func._schema.arguments, args, strict=False)
    return [
        tensor
        for argument, value in pairs
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in pytree.tree_leaves(value)
        if isinstance(tensor, Tensor)
    ]
