"""Tensors are narrowed as `index_select` narrows them, in a time that doesn't depend on how many dims there are."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from depgraph.cutting.slicing import selected


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_what_is_selected_is_what_stands_there(dim: int) -> None:
    tensor, index = torch.randn(4, 5, 6), torch.tensor([0, 3])
    for given in (tensor, tensor.transpose(0, 1), tensor[:, :0]):
        if given.shape[dim] > 3:
            assert torch.equal(selected(given, dim, index), given.index_select(dim, index))


def test_stacked_matrices_are_narrowed_as_fast_as_one() -> None:
    stacked, index = torch.randn(4, 256, 1024), torch.arange(0, 1024, 3)
    flat = stacked.flatten(0, 1)
    one, several = (_seconds(lambda t=t: selected(t, t.ndim - 1, index)) for t in (flat, stacked))
    assert several < 4 * one


def _seconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(7):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)
