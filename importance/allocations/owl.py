"""OWL: blocks with more outliers keep more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.allocations.allocated import Arrays, at_levels
from importance.allocations.blocks import Given, PerBlock, blocks


def outlier_ratio(values: np.ndarray, times: float = 5.0) -> float:
    """The per cent of `values` (any shape, not negative) that are greater than `times` their mean: OWL's LOD with its M."""
    return 100.0 * float((values > times * values.mean()).mean()) if values.size else 0.0


def leads(ratios: Mapping[str, float], spread: float) -> dict[str, float]:
    """How much more than the average share each name keeps, for its outlier ratio; zeros where all ratios are equal.

    From -spread to +spread at most, with mean 0: 2 * spread * (ratio - least) / (most - least), less the mean of that.
    """
    given = np.array(list(ratios.values()))
    width = np.ptp(given)
    raised = 2 * spread * (given - given.min()) / width if width > 0 else np.zeros(len(given))
    return dict(zip(ratios, (raised - raised.mean()).tolist(), strict=True))


@torch.no_grad()
def weight_outliers(graph: DependencyGraph, times: float = 5.0) -> dict[str, float]:
    """Of every block, the per cent of its weights (parameters of two dims or more) above `times` their mean magnitude."""
    found = {}
    for block in blocks(graph):
        parameters = graph.model.get_submodule(block).parameters()
        sizes = [p.detach().abs().float() for p in parameters if p.dim() > 1 and not p.is_meta]
        count = max(sum(size.numel() for size in sizes), 1)
        limit = times * sum(float(size.double().sum()) for size in sizes) / count
        found[block] = 100.0 * sum(int((size > limit).sum()) for size in sizes) / count
    return found


@dataclass(frozen=True)
class Owl:
    """OWL (METHODS.md 2.17): at the sparsity S, block l keeps the share 1 - S + lead_l of each of its axes.

    The leads have mean 0 over the blocks and differ by 2 * `spread` at the most. An axis that lies in no block has the lead 0;
    one whose share would be above 1 loses nothing yet. Equal ratios give the uniform allocation. OWL weights blocks by their
    number, so its S isn't the share of parameters that goes: the plan finds the S that meets the target exactly.

    Args:
        ratios: the outlier ratio of every block or axis, in per cent, or a function of the graph that finds them. The paper
            takes it of the Wanda scores of all weights of a block; None takes it of the weights' magnitudes, which needs no
            data (`weight_outliers`), and is uniform where a model has no blocks.
        spread: the paper's lambda.
        times: the paper's M, where `ratios` is None.

    Raises ScoreError: `spread` or `times` is out of range; when called, for ratios that don't fit, see `PerBlock.of`.
    """

    ratios: Given | None = None
    spread: float = 0.08
    times: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 0.5:
            raise ScoreError(f"the spread of OWL is {self.spread!r}: give a number from 0 to 0.5")
        if not 0 < self.times < np.inf:
            raise ScoreError(f"OWL's outliers are {self.times!r} times the mean: give a finite number above 0")

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        given = weight_outliers(graph, self.times) if self.ratios is None else self.ratios
        if self.ratios is None and not given:
            return at_levels(graph, scores, lambda axis: lambda shares: shares)
        found = PerBlock.of(graph, given, "the outlier ratios")
        lead = leads(found.values, self.spread)
        return at_levels(graph, scores, lambda axis: lambda shares: shares + found.get(axis, 0.0, lead))
