"""A batch taken apart into its samples, for scores that look at the gradient of each alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph import DependencyGraph
from depgraph.errors import DataError
from importance.calling import samples_second


def require_samples_first(graph: DependencyGraph) -> None:
    """Raise DataError where the samples of an input lie along its second dim: a batch isn't taken apart along that."""
    for name in sorted(samples_second(graph)):
        raise DataError(
            f"the samples of {name!r} lie along its second dim, as {type(graph.model).__name__} counts or attends to the steps along "
            "its first, and this score takes the gradient of each sample alone: trace a module that takes samples first"
        )


def sample_count(batch: Any) -> int:
    """How many samples a batch has: the leading size that its tensors share, but for those of size 1 there; 1 without any.

    Raises DataError when they don't share one, or it is 0.
    """
    sizes = sorted({len(leaf) for leaf in pytree.tree_leaves(_plain(batch)) if isinstance(leaf, Tensor) and leaf.ndim})
    if sizes and sizes[0] == 1:
        sizes = sizes[1:] or sizes
    if len(sizes) > 1:
        raise DataError(
            f"a batch can't be split into its samples, as the first dims of its tensors are {', '.join(map(str, sizes))} long: "
            "give tensors that all have the samples along their first dim"
        )
    if sizes == [0]:
        raise DataError("a batch is empty: its tensors have no samples along their first dim")
    return sizes[0] if sizes else 1


def largest_size(batch: Any) -> int:
    """The largest leading size of a batch's tensors, which need not share one: how many samples it has; 1 without any."""
    return max((len(t) for t in pytree.tree_leaves(_plain(batch)) if isinstance(t, Tensor) and t.ndim), default=1)


def samples_of(batch: Any) -> Iterator[Any]:
    """The samples of a tensor, tuple or dict, each as a batch of one.

    What isn't a tensor with dims, and a tensor of size 1 along its first (positions that all samples share), goes into all.

    Raises DataError as `sample_count` does.
    """
    count, plain = sample_count(batch), _plain(batch)
    for index in range(count):
        yield pytree.tree_map(lambda leaf, at=index: _one(leaf, at), plain)


def _plain(batch: Any) -> Any:
    """Mappings of any kind as dicts, which can be looked into."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _one(leaf: Any, index: int) -> Any:
    return leaf.narrow(0, index, 1) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) > 1 else leaf
