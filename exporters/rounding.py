"""Some models make so much of rounding that PyTorch and a runtime differ visibly though both are right: double precision tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph.capture.keeping import unwritten
from depgraph.cutting.doubling import in_double
from exporters.calls import FlatModel
from exporters.cases import Case

ROUNDED = (
    "the model makes much of rounding: PyTorch itself is up to {:.1e} of the largest output away from what it computes in "
    "double precision, and the file, which was compared with that, isn't much further"
)
_TIMES = 4  # as far as PyTorch is from double precision, another order of the same sums may be
_MOST = 1e-2  # of the largest output: with more, a comparison says nothing


def in_double_precision(flat: FlatModel, cases: Sequence[Case]) -> tuple[list[Case], float] | None:
    """The cases with what the model makes of them in double precision, and how far from that rounding may lead.

    With them, the largest share of an output's magnitude by which PyTorch's own rounding moves it. None where the model
    can't be run so, chooses otherwise then, or where rounding moves an output by more than a hundredth.
    """
    found, worst = [], 0.0
    for case in cases:
        try:
            with torch.no_grad(), unwritten(flat) as written, in_double():
                made = pytree.tree_map(written.own, flat(*(t.clone() for t in case.inputs)))
        except Exception:  # an operator that can't be run so proves nothing
            return None
        moved = [_moved(*pair) for pair in zip(case.expected, made, strict=True)]
        if not all(share <= _MOST for _, share in moved):
            return None
        worst = max(worst, *(share for _, share in moved))
        expected = tuple(
            t.detach().cpu() if t.is_floating_point() else e for t, e in zip(made, case.expected, strict=True)
        )
        found.append(replace(case, expected=expected, rounding=tuple(_TIMES * distance for distance, _ in moved)))
    return found, worst


def _moved(single: Tensor, double: Tensor) -> tuple[float, float]:
    """How far apart two outputs are, and which share of the largest magnitude that is: infinite where they can't be compared."""
    if single.shape != double.shape or not single.is_floating_point() and not torch.equal(single, double.cpu()):
        return float("inf"), float("inf")
    one, other = single.double(), double.detach().cpu().double()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf"), float("inf")
    finite = one.isfinite()
    apart, largest = ((t[finite].abs().max().item() if finite.any() else 0.0) for t in (one - other, other))
    return apart, apart / largest if largest else apart
