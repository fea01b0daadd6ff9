"""Scores of branches and of groups that compare: both as what the loss rises by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from depgraph import DependencyGraph, Plan, Target
from depgraph.errors import ScoreError
from depgraph.scoring import Scorer, Scores, checked_scores
from importance.calling import check_batches, inputs_of, moved, named_inputs, run_model
from importance.choices import pick
from importance.depth.candidates import OF, names_of
from importance.depth.engine import NORMAL, Batches, Effort, Engine
from importance.depth.metrics import Distance, LossMetric, Measured, Metric
from importance.depth.order import Counted
from importance.losses import own_loss

UNIT = "loss"
_TRIALS = 3
_LEAST = 1e-6  # of the loss: a cut that doesn't raise it still costs so much


@dataclass(frozen=True)
class LossIncrease:
    """What the loss rises by without each block or branch: `Without`, less the value of the whole model.

    Below 0 where the model is better without it. With `InLoss` for groups it is what `graph.plan(..., scope="both")` takes.

    Args:
        batches: tensors, tuples or dicts.
        of: "blocks" or "branches".
        metric: None is the loss or, for models without one, the distance of outputs "norm".

    Raises ScoreError: an unknown `of`; when called, no such parts. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    of: str = "branches"
    metric: Metric | None = None
    effort: Effort = NORMAL
    unit: str = field(default=UNIT, init=False)

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(OF, self.of, "kind of part")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        names = names_of(graph, self.of)
        engine = Engine(graph, self.batches, names, self.metric, self.effort)
        whole, found = engine.value(()), Counted()
        for name in names:
            found[name] = min(engine.value([name]) - whole, float(np.finfo(np.float32).max))
        found.evaluations = engine.evaluations
        return found


@dataclass(frozen=True)
class InLoss:
    """Scores of groups, scaled so that they add up to what the loss really rises by.

    A plan that keeps `keep` of the parameters is made by `scorer`, applied to a copy, and measured: all scores are multiplied
    by one number, so that those of what went sum up to the rise. Their order doesn't change.

    Args:
        scorer: scores of groups that compare across axes, such as `importance.Taylor(batches)`.
        batches: tensors, tuples or dicts.
        keep: share of the parameters that the trial keeps; best near what is wanted.
        metric: None is the loss or, for models without one, the distance of outputs "norm"; as for `LossIncrease`.

    Raises ScoreError, when called: scores of groups that went sum up to nothing. What `graph.plan` and `plan.apply` raise.
    """

    scorer: Scorer | Scores
    batches: Batches = field(repr=False)
    keep: float = 0.9
    metric: Metric | None = None
    unit: str = field(default=UNIT, init=False)
    additive: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_batches(self.batches)
        Target(params=self.keep)
        if not getattr(self.scorer, "comparable", True):
            raise ScoreError(
                f"the scores of {type(self.scorer).__name__} don't compare across axes, so that they can't be changes of one loss: "
                "take importance.Taylor(batches)"
            )

    def __call__(self, graph: DependencyGraph, /) -> Scores:
        if not isinstance(graph.model, nn.Module):
            raise ScoreError(
                f"changes of the loss by groups are measured in a PyTorch model, which {graph.name}, an ONNX file, isn't: load that, or "
                "let blocks go before groups, with depth= or --depth"
            )
        scores = checked_scores(graph, self.scorer)
        plan, gone = self._trial(graph, scores)
        before, after = self._values(graph, plan.apply(check="none"))
        factor = max(after - before, _LEAST * max(abs(before), 1.0)) / gone
        return {name: array * factor for name, array in scores.items()}

    def _trial(self, graph: DependencyGraph, scores: Scores) -> tuple[Plan, float]:
        """The plan that is measured, a smaller one where all that goes has no score, and the sum of the scores of what goes."""
        keep = self.keep
        for _ in range(_TRIALS):
            plan = graph.plan(scores, Target(params=keep), scope="global", rank="density")
            gone = sum(float(np.sum(scores[name][list(groups)])) for name, groups in plan.removal.items())
            if gone > 0:
                return plan, gone
            keep *= keep
        raise ScoreError(f"the scores of what a plan for {keep:.2g} of the parameters removes sum up to {gone:g}")

    def _values(self, graph: DependencyGraph, smaller: nn.Module) -> tuple[float, float]:
        """The value of the whole model, and of a smaller one."""
        measured: list[list[Measured]] = [[], []]
        device = next(graph.model.parameters(), torch.empty(0)).device
        for batch in (moved(batch, device) for batch in self.batches):
            with _still(graph.model), _still(smaller):
                args, kwargs = inputs_of(graph.model, batch)
                dense, cut = (run_model(model, args, kwargs) for model in (graph.model, smaller))
                metric = self.metric or _metric_of(graph.model, dense, batch)
                for into, output in zip(measured, (dense, cut), strict=True):
                    into.append(metric(graph.model, output, batch, dense))
        before, after = (sum(m.total for m in parts) / sum(m.of for m in parts) for parts in measured)
        return before, after


def _metric_of(model: nn.Module, output: Any, batch: Any) -> Metric:
    try:
        own_loss(output, named_inputs(model, batch))
    except ScoreError:
        return Distance("norm")
    return LossMetric()


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; each module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
