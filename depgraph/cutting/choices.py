"""What the pruned model chooses (top-k, argmax), so that the reference can choose alike where only rounding decides.

Two computations that are equal but for rounding may choose otherwise between values that are nearly the same, and then their
outputs have nothing to do with each other any more. So the reference takes the choices of the pruned model, wherever these
are as good as its own within the check's tolerance; elsewhere it keeps its own, and the outputs tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_WITH_VALUES = frozenset([_aten.topk.default, _aten.max.dim, _aten.min.dim])
_CHOOSES = _WITH_VALUES | {_aten.argmax.default, _aten.argmin.default}

Picks = dict[Node, torch.Tensor]


class Chosen(TorchDispatchMode):
    """Notes the indices that every choosing operator gives while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        made = func(*args, **(kwargs or {}))
        if func in _CHOOSES:
            picks = made[1] if func in _WITH_VALUES else made
            self.seen.append((func, picks.clone()))  # the code may write to its own
        return made

    def picks(self, nodes: Iterable[Node]) -> Picks:
        """The indices by graph node, if the same operators chose in the same order; none otherwise."""
        choosing = [node for node in nodes if node.target in _CHOOSES]
        if [node.target for node in choosing] != [func for func, _ in self.seen]:
            return {}
        return {node: indices for node, (_, indices) in zip(choosing, self.seen, strict=True)}


def chosen_alike(
    target: Any, arguments: tuple[Any, Mapping[str, Any]], made: Any, theirs: torch.Tensor, tolerance: float
) -> Any:
    """What a choosing operator `made`, with the choices `theirs` where they are as good within `tolerance` of the largest value."""
    args, kwargs = arguments
    source = args[0]
    mine = made[1] if target in _WITH_VALUES else made
    place = 2 if target is _aten.topk.default else 1
    dim = kwargs.get("dim", args[place] if len(args) > place else -1 if place == 2 else None)
    if mine.shape != theirs.shape or not source.ndim or dim is None:
        return made
    single = mine.ndim < source.ndim
    along = [indices.unsqueeze(dim) if single else indices for indices in (mine, theirs)]
    own, other = (source.gather(dim, indices) for indices in along)
    finite = source[source.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    as_good = (own == other) | ((own.double() - other.double()).abs() <= tolerance * scale)
    indices, values = torch.where(as_good, along[1], along[0]), torch.where(as_good, other, own)
    if single:
        indices, values = indices.squeeze(dim), values.squeeze(dim)
    return (values, indices) if target in _WITH_VALUES else indices
