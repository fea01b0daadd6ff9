"""Sums of an elementwise saliency over all dims of a tensor but one, in pieces, so that no full copy is ever made."""

from __future__ import annotations

import math
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
    along = max(range(like.ndim), key=lambda d: like.shape[d])
    for start, length in _pieces(like, along):
        element = saliency(*(_wide(tensor.narrow(along, start, length)) for tensor in tensors))
        for d, found in sums.items():
            others = [other for other in range(like.ndim) if other != d]
            part = element.sum(dim=others) if others else element
            (found.narrow(0, start, length) if d == along else found).add_(part)
    return sums


def _pieces(tensor: Tensor, along: int) -> Iterator[tuple[int, int]]:
    size = tensor.shape[along]
    row = math.prod(tensor.shape) // max(size, 1)
    step = max(1, PIECE.get(tensor.device.type, _PIECE_ELSEWHERE) // max(row, 1))
    return ((start, min(step, size - start)) for start in range(0, size, step))


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
