"""Scores of parts from their own weights: magnitude and first-order Taylor, with "+" to protect the ends; and random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.candidates import OF, between_ends, names_of, parts_of
from importance.depth.engine import Batches
from importance.gradients import backwards, require_module
from importance.losses import Loss
from importance.progress import shown
from importance.randomly import drawn


@dataclass(frozen=True)
class DepthMagnitude:
    """Shortened-LLaMA's magnitude (METHODS.md 2.7): the sum of |w|**p over all parameters that only this part uses.

    `first` and `last` parts at the ends are protected: they get no score. Magnitude+ is `DepthMagnitude(first=4, last=2)`.

    Raises ScoreError: an unknown `of`, p out of range; when called, no such parts, all are protected, NaN or infinite weights.
    """

    p: float = 1.0
    of: str = "blocks"
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        pick(OF, self.of, "kind of part")
        if not 0 < self.p < float("inf"):
            raise ScoreError(f"the power p of a magnitude must be a finite number above 0, it is {self.p}")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        held = _weights(graph, self.of, self.first, self.last)
        graph.require_finite(ScoreError)
        return {
            name: sum(float(_wide(weight).abs().pow(self.p).sum(dtype=torch.float64)) for weight in weights)
            for name, weights in held.items()
        }


@dataclass(frozen=True)
class DepthTaylor:
    """Shortened-LLaMA's Taylor (METHODS.md 2.7): the sum of |w * g|**p over all parameters that only this part uses.

    Gradients are added up over all batches before the absolute value is taken. Taylor+ is `DepthTaylor(..., first=4, last=2)`.
    `loss` is as in `importance.Taylor`; the model is put back as it was.

    Raises ScoreError: an unknown `of`; when called, no such parts, all are protected, no finite loss. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    loss: Loss | None = None
    p: float = 1.0
    of: str = "blocks"
    first: int = 0
    last: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        DepthMagnitude(self.p, self.of)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        require_module(graph, type(self).__name__)
        held = _weights(graph, self.of, self.first, self.last)
        alone = {str(k): w for k, w in enumerate(weight for weights in held.values() for weight in weights)}
        with backwards(graph.model, alone, self.loss, None) as backward:
            for batch in shown(self.batches, "scoring with gradients", self.progress):
                backward(batch)
            return {name: sum(map(self._saliency, weights)) for name, weights in held.items()}

    def _saliency(self, weight: Tensor) -> float:
        if weight.grad is None:
            return 0.0
        found = float((_wide(weight) * _wide(weight.grad.conj())).abs().pow(self.p).sum(dtype=torch.float64))
        if not math.isfinite(found):
            raise ScoreError("a gradient is NaN or infinite: look at the batches and the loss")
        return found


@dataclass(frozen=True)
class DepthRandom:
    """A score for every part, uniform in [0, 1), that depends on the seed and its name alone."""

    seed: int = 0
    of: str = "blocks"

    def __post_init__(self) -> None:
        pick(OF, self.of, "kind of part")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        return {name: float(drawn(self.seed, name, 1)[0]) for name in names_of(graph, self.of)}


def _weights(graph: DependencyGraph, of: str, first: int, last: int) -> dict[str, list[Tensor]]:
    """The parameters of each part that isn't protected."""
    parts = {part.name: part for part in parts_of(graph, of)}
    tensors = graph.tensors()
    return {name: [tensors[p] for p in parts[name].parameters] for name in between_ends(list(parts), first, last)}


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
