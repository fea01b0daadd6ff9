"""Which tensors seen so far lie in the memory of one that wasn't: torch makes some without an operator, as autograd does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from depgraph.capture.proxies import storage_key


@dataclass
class Memory:
    """Finds, among `seen` tensors, to which more may be appended, those that share the memory of another."""

    seen: Sequence[Tensor]
    _by_storage: dict[int, list[Tensor]] = field(default_factory=dict)
    _indexed: int = 0

    def twin(self, tensor: Tensor) -> Tensor | None:
        """The newest that shows the same memory in the same way."""
        return next((one for one in reversed(self.beside(tensor)) if _layout(one) == _layout(tensor)), None)

    def beside(self, tensor: Tensor) -> list[Tensor]:
        """All that lie in the same storage, the oldest first."""
        self._index()
        return self._by_storage.get(storage_key(tensor), [])

    def _index(self) -> None:
        for tensor in self.seen[self._indexed :]:
            self._by_storage.setdefault(storage_key(tensor), []).append(tensor)
        self._indexed = len(self.seen)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
