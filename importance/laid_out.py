"""Where the samples of a batch and their text lie in a tensor of a program: what makes rows of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph.origins import NOWHERE, Factors, Given
from importance.rows import Rows

Mask = tuple[int, Tensor]
"""A mask [samples, positions], true where there is text, and its number among the leaves of the call."""


@dataclass(frozen=True)
class Samples:
    """How many samples a batch has, and masks that say what of them is text and what padding.

    `leading` are the dims of inputs, see `depgraph.origins`, along which the samples are.
    """

    count: int
    masks: tuple[Mask, ...] = ()
    leading: Given = NOWHERE

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
        return cls(count, masks, frozenset((number, at[number]) for number, size in sizes.items() if size == count))

    def rows(
        self, values: Tensor, dim: int, dtype: torch.dtype, shared: bool = False, places: Sequence[Factors] = ()
    ) -> Rows:
        """A tensor's channels, along `dim`, as rows; `places` say what its dims come from.

        Where that isn't known, dims before the last are taken for positions of samples, in their order.
        """
        moved = values if dim in (-1, values.ndim - 1) else values.movedim(dim, -1)
        wide = moved.dtype if moved.dtype == dtype else torch.promote_types(moved.dtype, dtype)
        moved = moved.to(wide).abs() if wide.is_complex else moved.to(wide)
        moved, inner = self._samples_first(*_apart(moved, dim % max(values.ndim, 1), places))
        if inner is None:
            return Rows(moved.flatten(0, -2)[None] if moved.ndim > 1 else moved[None, None], None, shared, self.count)
        rows = moved.reshape(self.count, math.prod(size for size, _ in inner), moved.shape[-1])
        found = (self._text(mask, inner) for mask in self.masks)
        text = next((one for one in found if one is not None), None)
        return Rows(rows, None if text is None else text.to(rows.device), shared)

    def _samples_first(self, moved: Tensor, given: list[Given]) -> tuple[Tensor, list[tuple[int, Given]] | None]:
        """A tensor with the samples' dim in front, and the sizes and origins of all others but the channels'; None: no such."""
        found = [at for at, one in enumerate(given) if one & self.leading]
        if len(found) == 1 and moved.shape[found[0]] == self.count:
            order = [found[0], *(at for at in range(len(given)) if at != found[0])]
            moved = moved.permute(*order, len(given))
            return moved, [(moved.shape[k], given[at]) for k, at in enumerate(order) if k]
        lead = next((at for at in range(len(given)) if moved.shape[at] != 1), 0)
        if not self.count or not given or moved.shape[lead] % self.count:
            return moved, None
        first = moved.shape[lead] // self.count, given[lead] if self.count == 1 else NOWHERE
        return moved, [first, *((moved.shape[at], given[at]) for at in range(lead + 1, len(given)))]

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


def _apart(moved: Tensor, dim: int, places: Sequence[Factors]) -> tuple[Tensor, list[Given]]:
    """A tensor with its channels last, dims that were laid out as one parted, and what each dim but the last comes from."""
    if len(places) != moved.ndim:
        return moved, [NOWHERE] * (moved.ndim - 1)
    given: list[Given] = []
    for factors in (one for at, one in enumerate(places) if at != dim):
        sizes = [factor.size for factor in factors]
        if len(factors) > 1 and torch.Size(sizes).numel() == moved.shape[len(given)]:
            moved = moved.unflatten(len(given), sizes)
            given += [factor.given for factor in factors]
        else:
            given.append(factors[0].given if len(factors) == 1 else NOWHERE)
    return moved, given
