"""Memory that a capture on real values needs no longer: its tensors stay, as they say which node they are, what they hold needn't.

Without this a capture holds all that a forward computes at once, which for a detector is ten times what a forward holds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from depgraph.capture.memory import Memory
from depgraph.capture.proxies import storage_key

PAUSE = 1 << 25  # bytes that are made before it is looked again for what is spent


@dataclass
class Spent:
    """Lets go of the memory of tensors that only `alive`, the capture's own list, and its `memory` still hold."""

    alive: Sequence[Tensor]
    memory: Memory
    _made: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    _since: int = 0

    def made(self, tensor: Tensor) -> None:
        """An operator has made a tensor."""
        if tensor.layout is not torch.strided or tensor.requires_grad:
            return
        key = storage_key(tensor)
        if key not in self._made:
            self._since += tensor.nbytes
        self._made.setdefault(key, {})[id(tensor)] = tensor
        if self._since > PAUSE:
            self._since = 0
            self._let_go()

    def _let_go(self) -> None:
        """Empty the storages that nothing else shows, in Python or in torch itself."""
        ours = Counter(id(tensor) for tensor in (*self.alive, *self.memory.listed()))
        for key, tensors in list(self._made.items()):
            storage = next(iter(tensors.values())).untyped_storage()
            if _is_shown(storage, len(tensors)) or _is_held(tensors, ours):
                continue
            if storage.resizable():
                storage.resize_(0)
            del self._made[key]


def _is_shown(storage: torch.UntypedStorage, count: int) -> bool:
    """Does anything show a storage besides so many tensors and the object that is given?"""
    beside = 4  # torch itself, the variables of the caller and here, and the argument of `getrefcount`
    return torch._C._storage_Use_Count(storage._cdata) > count + 1 or sys.getrefcount(storage) > beside


def _is_held(tensors: dict[int, Tensor], ours: Counter[int]) -> bool:
    """Does anyone hold one of the tensors besides our lists and this dict, or torch itself?"""
    beside = 3  # the dict's values, the variable below and the argument of `getrefcount`
    return any(t._use_count() > 1 or sys.getrefcount(t) > ours[id(t)] + beside for t in tensors.values())  # type: ignore[attr-defined]
