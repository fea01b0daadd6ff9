"""LD-Pruner's score: how far the statistics of the outputs move when a part is left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import DataError
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.candidates import OF, names_of
from importance.depth.engine import NORMAL, Batches, Effort, Engine
from importance.depth.metrics import Distance, main_output
from importance.depth.order import Counted
from importance.depth.programs import Names


@dataclass(frozen=True)
class OutputShift:
    """LD-Pruner (METHODS.md 2.24): |mean(z_k) - mean(z)| + |std(z_k) - std(z)|, z the output, z_k that without part k.

    Mean and standard deviation (of the population) are over the samples of all batches, for each element of the first
    output of fractions [samples, ...]; the norms are Euclidean. What the model draws at random is the same with and without k.

    Raises ScoreError: an unknown `of`; when called, no such parts. DataError: unfit batches, or outputs of several shapes.
    """

    batches: Batches = field(repr=False)
    of: str = "branches"
    effort: Effort = NORMAL

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(OF, self.of, "kind of part")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        names = names_of(graph, self.of)
        engine = Engine(graph, self.batches, names, Distance("norm"), self.effort)
        mean, std = _statistics(engine, frozenset())
        found = Counted()
        for name in names:
            other_mean, other_std = _statistics(engine, frozenset([name]))
            found[name] = float((other_mean - mean).norm() + (other_std - std).norm())
        found.evaluations = engine.evaluations
        return found


def _statistics(engine: Engine, removed: Names) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all samples, without the removed parts."""
    count, mean, squares = 0, None, None
    for k in range(len(engine.data)):
        output = engine.output(removed, k) if removed else engine.dense[k]
        rows = main_output(output).double()
        if mean is None or squares is None:
            mean, squares = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        if mean.shape != rows.shape[1:]:
            raise DataError(
                f"the outputs of the batches are of several shapes, {list(mean.shape)} and {list(rows.shape[1:])} for a sample: "
                "their statistics need batches of the same length"
            )
        change = rows - mean
        count += len(rows)
        mean = mean + change.sum(0) / count
        squares = squares + (change * (rows - mean)).sum(0) if len(rows) == 1 else _merged(rows, squares, change, count)
    assert mean is not None and squares is not None
    return mean, (squares / count).sqrt()


def _merged(rows: Tensor, squares: Tensor, change: Tensor, count: int) -> Tensor:
    """The sum of squared deviations with those of further rows, whose deviations from the former mean are `change`."""
    before = count - len(rows)
    own = (rows - rows.mean(0)).square().sum(0)
    return squares + own + change.mean(0).square() * before * len(rows) / count
