"""Magnitude: what has small weights is worth little."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np
import torch

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.layout import Layout
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec
from importance.sums import index_sums


@dataclass(frozen=True)
class Magnitude:
    """Group magnitude (METHODS.md 2.4): per tensor the sum of |w|**p over all dims but the axis's own, no root.

    Norm scales and biases count as tensors of one dim. By default the tensors of a group are averaged and the scores of
    each axis divided by their mean. That brings them to one scale, but not to one meaning: a head at half the mean of its
    axis isn't worth a neuron at half the mean of its own. So a plan takes the same share of every axis, the local pruning
    that LLM-Pruner and Torch-Pruning default to, unless it is asked for `scope="global"`.

    Args:
        p: the power, above 0.
        reduction: over members: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.

    Raises ScoreError: for `p` out of range or an unknown name; when called, for NaN or infinite weights.
    """

    comparable: ClassVar[bool] = False

    p: float = 2.0
    reduction: ReductionSpec = "mean"
    normalise: NormalisationSpec = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.p, Real) or not 0 < self.p < float("inf"):
            raise ScoreError(f"the power p of a magnitude must be a finite number above 0, it is {self.p!r}")
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        layout = Layout.of(graph)
        dims = layout.dims
        sums = {name: index_sums(self._power, (weight,), dims[name]) for name, weight in layout.parameters.items()}
        return layout.scores(sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))

    def _power(self, weight: torch.Tensor) -> torch.Tensor:
        if self.p == 2 and not weight.is_complex():
            return weight * weight
        size = weight.abs()
        return size if self.p == 1 else size.pow_(self.p)
