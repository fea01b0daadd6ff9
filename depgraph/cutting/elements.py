"""Which elements of which parameters lie where in a tensor that is put together from them, as biases may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.operators import aten_name

NOTHING, UNKNOWN = -1, -2  # a zero, which stays zero whatever it is multiplied by, and what isn't a parameter's
_LAID_OUT = frozenset(
    [
        *("cat", "stack", "view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "expand", "contiguous"),
        *("clone", "alias", "detach", "t", "numpy_T", "transpose", "permute", "getitem", "split", "split_with_sizes"),
        *("chunk", "unbind", "slice", "select", "narrow"),
    ]
)
ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])


@dataclass
class Elements:
    """Numbers of elements, counted through all parameters that tensors are made of; `parameters` are names by placeholder."""

    parameters: Mapping[str, str]
    first: dict[Node, int] = field(default_factory=dict)
    _next: int = 0

    def of(self, node: Node) -> torch.Tensor:
        """The number of the element at each place of a tensor, NOTHING or UNKNOWN."""
        made = self._made(node)
        assert isinstance(made, torch.Tensor)
        return made

    def _made(self, node: Node) -> Any:
        name = aten_name(node)
        if node.name in self.parameters:
            return self._numbered(node)
        if name in ZEROS:
            return torch.full(tuple(node.meta["val"].shape), NOTHING)
        if name in _LAID_OUT:
            args, kwargs = pytree.tree_map_only(Node, self._made, (node.args, dict(node.kwargs)))
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return pytree.tree_map_only(torch.Tensor, lambda t: torch.full(tuple(t.shape), UNKNOWN), node.meta["val"])

    def _numbered(self, node: Node) -> torch.Tensor:
        shape = tuple(node.meta["val"].shape)
        count = int(np.prod(shape))
        if node not in self.first:
            self.first[node] = self._next
            self._next += count
        return torch.arange(self.first[node], self.first[node] + count).reshape(shape)

    def rows(self, numbers: np.ndarray) -> dict[Node, tuple[int, np.ndarray]] | None:
        """The rows of parameters that have just these elements, with the dim that they count along; None where they aren't rows."""
        if (numbers == UNKNOWN).any():
            return None
        found: dict[Node, tuple[int, np.ndarray]] = {}
        for node, first in self.first.items():
            shape = tuple(node.meta["val"].shape)
            own = np.unique(numbers[(numbers >= first) & (numbers < first + int(np.prod(shape)))]) - first
            if len(own):
                whole = rows_of(shape, own)
                if whole is None:
                    return None
                found[node] = whole
        return found


def rows_of(shape: tuple[int, ...], elements: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The dim, and its indices, of which `elements` (sorted, counted in row-major order) are all; None where there is none."""
    for d, at in enumerate(np.unravel_index(elements, shape)):
        rows = np.unique(at)
        if len(rows) * (int(np.prod(shape)) // shape[d]) == len(elements):
            return d, rows
    return None
