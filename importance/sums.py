"""Sums of an elementwise saliency over all dims of a tensor but one, in pieces, so that no full copy is ever made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Saliency = Callable[..., Tensor]
"""Maps pieces of tensors of one shape (in float32 or wider) to the real saliency of each element, a new tensor."""

PIECE = {"cpu": 1 << 17}  # pieces of a megabyte and more are new pages each time, at twice the time
_PIECE_ELSEWHERE = 1 << 24


@torch.no_grad()
def index_sums(saliency: Saliency, tensors: tuple[Tensor, ...], dims: tuple[int, ...]) -> dict[int, Tensor]:
    """For each of `dims`, the saliency summed over all other dims: float64 tensors [size of the dim] on their device.

    Elements are taken in float32 (float64 where they are float64), sums of pieces are added in float64.
    """
    like = tensors[0]
    total = torch.float32 if like.device.type == "mps" else torch.float64
    sums = {d: torch.zeros(like.shape[d], dtype=total, device=like.device) for d in dims}
    for piece in _pieces(like):
        element = saliency(*(_wide(tensor[piece]) for tensor in tensors))
        for d, found in sums.items():
            others = [other for other in range(like.ndim) if other != d]
            found[piece[d]].add_(element.sum(dim=others) if others else element)
    return sums


def _pieces(tensor: Tensor) -> Iterator[tuple[slice, ...]]:
    """Slices that cut a tensor into what lies together in memory, as far as its strides say that."""
    most = PIECE.get(tensor.device.type, _PIECE_ELSEWHERE)
    steps = {}
    row = 1  # how many elements lie within one index of the dim
    for d in sorted(range(tensor.ndim), key=tensor.stride):
        steps[d] = max(1, min(most // max(row, 1), tensor.shape[d]))
        row *= tensor.shape[d]
    cuts = (range(0, size, steps[d]) for d, size in enumerate(tensor.shape))
    for starts in itertools.product(*cuts):
        yield tuple(slice(start, start + steps[d]) for d, start in enumerate(starts))


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
