"""Where the samples of a batch and their text lie in a tensor of a program: what makes rows of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph.origins import NOWHERE, PICKED, Factor, Factors, Given
from importance.rows import Rows

Mask = tuple[int, Tensor]
"""A mask [samples, positions], true where there is text, and its number among the leaves of the call."""


@dataclass(frozen=True)
class Samples:
    """How many samples a batch has, and masks that say what of them is text and what padding.

    `leading` are the dims of inputs, see `depgraph.origins`, along which the samples are; `shapes` those of the leaves of the call.
    """

    count: int
    masks: tuple[Mask, ...] = ()
    leading: Given = NOWHERE
    shapes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, args: Iterable[Any], kwargs: Mapping[str, Any], second: frozenset[str] = frozenset()) -> Samples:
        """Of a call's arguments: how many samples, and all keyword arguments [samples, positions] named ...attention_mask.

        Samples lie along the first dim of a tensor, and along the second of keyword arguments whose names are in `second`.
        """
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        turned = {id(kwargs[name]) for name in second & kwargs.keys()}
        at = {k: int(id(t) in turned and t.ndim > 1) for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.ndim}
        sizes = {number: leaves[number].shape[dim] for number, dim in at.items()}
        count = max(sizes.values(), default=1)
        numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        named = [t for name, t in kwargs.items() if name.endswith("attention_mask")]
        padded = [t for t in named if isinstance(t, Tensor) and t.ndim == 2 and not bool((t != 0).all())]
        masks = tuple((numbers[id(t)], t != 0) for t in padded)
        leading = frozenset((number, at[number]) for number, size in sizes.items() if size == count)
        return cls(count, masks, leading, tuple(tuple(getattr(leaf, "shape", ())) for leaf in leaves))

    def rows(
        self, values: Tensor, dim: int, dtype: torch.dtype, shared: bool = False, places: Sequence[Factors] = ()
    ) -> Rows:
        """A tensor's channels, along `dim`, as rows; `places` say what its dims come from.

        Where that isn't known, dims before the last are taken for positions of samples, in their order, unless rows were picked.
        """
        moved = values if dim in (-1, values.ndim - 1) else values.movedim(dim, -1)
        if moved.dtype != dtype:
            moved = moved.to(torch.promote_types(moved.dtype, dtype))
            moved = moved.abs() if moved.is_complex() else moved
        if not moved.ndim:
            return Rows(moved[None, None, None], None, shared, self.count)
        how = _arranged(moved.shape, _others(places, dim, values.ndim), self)
        if how is None:
            return Rows(moved.flatten(0, -2)[None] if moved.ndim > 1 else moved[None, None], None, shared, self.count)
        rows = moved if how.shape is None else moved.reshape(how.shape)
        rows = rows if how.order is None else rows.permute(how.order)
        rows = rows if rows.ndim == 3 else rows.reshape(how.rows)
        found = (self._text(mask, how.inner) for mask in self.masks)
        text = next((one for one in found if one is not None), None)
        return Rows(rows, None if text is None else text.to(rows.device), shared)

    def _text(self, mask: Mask, inner: Sequence[tuple[int, Given]]) -> Tensor | None:
        """A mask [samples, rows of each] for rows with these dims, of which one must be the tokens' and heads, say, the others.

        None where none of them, or more than one, is that.
        """
        number, text = mask
        if len(text) != self.count:
            return None
        others = {(other, 1) for other, _ in self.masks if other != number}
        tokens = [at for at, (_, given) in enumerate(inner) if (number, 1) in given]
        tokens = tokens or [
            at for at, (size, given) in enumerate(inner) if size == text.shape[1] and not given & others
        ]
        if len(tokens) != 1 or inner[tokens[0]][0] != text.shape[1]:
            return None
        spread = text.reshape(self.count, *(text.shape[1] if at == tokens[0] else 1 for at in range(len(inner))))
        return spread.expand(self.count, *(size for size, _ in inner)).reshape(self.count, -1)


class _Arranged(NamedTuple):
    """How rows of samples are made of a tensor whose channels are last: seen in `shape`, its dims then in `order`, as `rows`.

    None for what stays as it is. `inner`: the sizes and origins of the dims between samples and channels.
    """

    shape: tuple[int, ...] | None
    order: tuple[int, ...] | None
    rows: tuple[int, int, int]
    inner: tuple[tuple[int, Given], ...]


def _others(places: Sequence[Factors], dim: int, ndim: int) -> tuple[Factors, ...] | None:
    """What dims but the channels' come from; None where that isn't known."""
    if len(places) != ndim:
        return None
    return (*places[: dim % ndim], *places[dim % ndim + 1 :])


def _arranged(shape: torch.Size, places: tuple[Factors, ...] | None, samples: Samples) -> _Arranged | None:
    """How samples become rows; None where they can't be told apart."""
    return _arrangement(shape, places, samples.count, samples.leading, samples.shapes)


@lru_cache(maxsize=1024)
def _arrangement(
    shape: torch.Size,
    places: tuple[Factors, ...] | None,
    count: int,
    leading: Given,
    inputs: tuple[tuple[int, ...], ...],
) -> _Arranged | None:
    sizes, given = _apart(shape[:-1], places, inputs)
    found = [at for at, one in enumerate(given) if one & leading]
    order = list(range(len(sizes)))
    if len(found) == 1 and sizes[found[0]] == count:
        order.insert(0, order.pop(found[0]))
        inner = [(sizes[at], given[at]) for at in order[1:]]
    else:
        lead = next((at for at, size in enumerate(sizes) if size != 1), 0)
        if not count or not sizes or sizes[lead] % count or given[lead] == PICKED:
            return None
        first = sizes[lead] // count, given[lead] if count == 1 else NOWHERE
        inner = [first, *((sizes[at], given[at]) for at in order[lead + 1 :])]
    seen, channels = (*sizes, shape[-1]), shape[-1]
    turned = (*order, len(order)) if order != sorted(order) else None
    rows = (count, math.prod(size for size, _ in inner), channels)
    if turned is None:
        return _Arranged(None if rows == shape else rows, None, rows, tuple(inner))
    return _Arranged(None if seen == shape else seen, turned, rows, tuple(inner))


def _apart(
    sizes: Sequence[int], places: tuple[Factors, ...] | None, inputs: tuple[tuple[int, ...], ...]
) -> tuple[list[int], list[Given]]:
    """The sizes of dims, those that were laid out as one parted, and what each comes from.

    `places` may be those of another batch: what comes from an input has the size that it has there now.
    """
    if places is None:
        return list(sizes), [NOWHERE] * len(sizes)
    parted: list[int] = []
    given: list[Given] = []
    for size, factors in zip(sizes, places, strict=True):
        own = [_size(factor, inputs) for factor in factors]
        if len(own) > 1 and math.prod(own) == size:
            parted += own
            given += [factor.given for factor in factors]
        else:
            parted.append(size)
            given.append(factors[0].given if len(factors) == 1 else NOWHERE)
    return parted, given


def _size(factor: Factor, inputs: tuple[tuple[int, ...], ...]) -> int:
    """The size of a factor where the inputs have these shapes."""
    now = {inputs[number][dim] for number, dim in factor.given if number < len(inputs) and dim < len(inputs[number])}
    return now.pop() if len(now) == 1 else factor.size
