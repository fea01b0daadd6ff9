"""SAP: what the PQ index of an axis's scores says can go."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.allocations.allocated import Arrays, at_levels, in_proportion, not_negative, scored


def pq_index(values: np.ndarray, p: float = 0.5, q: float = 1.0) -> float:
    """How unequal values are: 1 - d^(1/q - 1/p) * ||w||_p / ||w||_q of d values [d], 0 <= p < q; 0 where all are equal or 0.

    At most 1 - d^(1/q - 1/p); the same for values times a constant, in another order, or given twice over.
    """
    sizes = np.abs(np.asarray(values, dtype=np.float64))
    largest = sizes.max(initial=0.0)
    if not largest:
        return 0.0
    norms = [float(((sizes / largest) ** power).sum()) ** (1 / power) for power in (p, q)]
    return max(0.0, 1 - len(sizes) ** (1 / q - 1 / p) * norms[0] / norms[1])


@dataclass(frozen=True)
class Sap:
    """SAP (METHODS.md 2.22), with the scores of an axis's groups as the vector whose PQ index is taken.

    Of d groups, m = ceil(d * (1 + eta)^(-q / (q - p)) * (1 - index)^(pq / (q - p))) are needed, and
    floor(d * min(gamma * (1 - m / d), beta)) may go. SAP removes just these, and trains, round after round; here all axes
    lose in proportion to them, as many of them as the target takes, and what SAP would leave goes last.

    Raises ScoreError: parameters out of range; when called, for negative scores.
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not (
            0 < self.p < self.q < np.inf and -1 < self.eta < np.inf and 0 < self.gamma < np.inf and 0 < self.beta <= 1
        ):
            raise ScoreError(f"SAP takes 0 < p < q, eta > -1, gamma > 0 and 0 < beta <= 1, not {self}")

    def needed(self, values: np.ndarray) -> int:
        """How many of the values [d], not negative, the PQ index says are needed: m."""
        each = self.q / (self.q - self.p)
        share = (1 + self.eta) ** -each * (1 - pq_index(values, self.p, self.q)) ** (self.p * each)
        return math.ceil(len(values) * share - 1e-9)

    def may_go(self, values: np.ndarray) -> int:
        """How many of the values [d] go in one round."""
        if not len(values):
            return 0
        share = min(self.gamma * (1 - self.needed(values) / len(values)), self.beta)
        return max(0, math.floor(len(values) * share + 1e-9))

    def __call__(self, graph: DependencyGraph, scores: Arrays, /) -> dict[str, np.ndarray]:
        paces = {
            axis.name: self.may_go(not_negative(axis, given, "the PQ index")) / axis.size
            for axis, _, given in scored(graph, scores)
        }
        return at_levels(graph, scores, lambda axis: in_proportion(paces[axis.name]))
