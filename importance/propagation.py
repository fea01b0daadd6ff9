"""Scores that are taken consumer after consumer, on what the model puts out once all before it is pruned.

Dense propagation looks at every consumer in the whole model. Wanda, Wanda-sp, SparseGPT and OBS-like methods look at it where
what comes before it has lost its groups already, and has made up for them if it does that (METHODS.md 3, "propagation"). Here
the batches stand still before each consumer, which is scored, loses its groups and is run without them: one pass for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from depgraph import Axis, DependencyGraph, Plan
from depgraph.capture.capturing import quiet
from depgraph.errors import ScoreError
from depgraph.observing import Met
from depgraph.scoring import Scorer, Scores
from importance.accumulators import Statistic
from importance.allocations.allocated import ascending
from importance.calling import calls_of, check_batches, samples_in
from importance.collector import Collector, Gathering
from importance.compensation import Compensation, bias_of, change_of, write_bias
from importance.consumers import Consumer, Key
from importance.holding import held_by
from importance.readers import Reader, readers_among
from importance.statistics import Statistics

PROPAGATIONS = {
    "dense": "statistics of every consumer are those of the whole model",
    "sequential": "those of the model with all that comes before the consumer pruned, and made up for if the recipe does that",
}


@runtime_checkable
class ByAxis(Protocol):
    """An estimator that scores an axis by statistics of the consumers that read it, which `needs` names."""

    @property
    def needs(self) -> tuple[Statistic, ...]: ...

    @property
    def data(self) -> Any: ...

    def of_axis(self, axis: Axis, found: Statistics) -> np.ndarray: ...


@dataclass(frozen=True)
class Sequence:
    """What was found on the way: scores of the axes that the plan cuts, and the statistics that they are from."""

    scores: dict[str, np.ndarray]
    statistics: Statistics = field(repr=False)


def sequential(
    plan: Plan, score: ByAxis, how: Compensation | None = None, gathering: Gathering | None = None
) -> Sequence:
    """Score the axes that a plan cuts, one after the other, each with those before it cut to the size that the plan leaves.

    The plan says how many groups every axis loses, the new scores which. An axis is settled at the last operator that reads it,
    and what read it before that saw it whole. So an axis that is read everywhere, such as the width of a residual stream, is
    settled last, on what the model puts out once all within its blocks is pruned; nothing of it is taken out meanwhile. Groups
    are taken out by zeros in front of what reads them, so that what is normalised together with them keeps its scale. Branches
    that the plan leaves out run meanwhile. An axis that nothing with two operands reads has no scores here.

    Args:
        plan: how many groups of which axes go. score: an estimator with batches for its `data`.
        how: consumers make up for what they lost in that way before they are run, on a copy of the model (weights that are used
            several times don't); None: they don't.
        gathering: precision of the sums.

    Raises: as `importance.collect`; ScoreError where a batch takes another way through the model than the others.
    """
    batches = score.data
    if isinstance(batches, Statistics):
        raise ScoreError("sequential propagation takes statistics on its way: give the score batches, not statistics")
    check_batches(batches)
    walk = _Walk(plan, score, how, gathering or Gathering())
    with quiet(plan.graph.model), quiet(walk.graph.model):
        walk.run(list(batches))
    return Sequence(walk.scores, walk.statistics)


class Known:
    """Scores that are known already, spread over the axes as those of `like` would be."""

    def __init__(self, scores: Scores, like: Scorer | Scores) -> None:
        self.scores = scores
        self.comparable = getattr(like, "comparable", True)
        self.additive = getattr(like, "additive", False)

    def __call__(self, graph: DependencyGraph, /) -> Scores:
        return self.scores


def reordered(
    graph: DependencyGraph, scores: Mapping[str, np.ndarray], order: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`scores` with those of an axis handed to its groups by `order`: the lowest to the one that is lowest there.

    So axes compare as before, and lose as many groups to the same target.
    """
    found = dict(scores)
    for name, by in order.items():
        groups = ascending(graph[name], by)
        values = np.sort(scores[name][groups])
        for k in range(1, len(values)):
            values[k] = max(values[k], np.nextafter(values[k - 1], np.inf))
        found[name] = scores[name].copy()
        found[name][groups] = values
    return found


class _Walk:
    """Where the batches stand, what was found so far, and what is gone."""

    def __init__(self, plan: Plan, score: ByAxis, how: Compensation | None, gathering: Gathering) -> None:
        self.plan, self.score = plan, score
        needs = dict.fromkeys([*score.needs, *(how.needs if how else ())])
        axes = frozenset(plan.removal)
        self.collector = Collector(plan.graph, list(needs), replace(gathering, axes=axes))
        self.statistics = Statistics(plan.graph, self.collector.found)
        self.scores: dict[str, np.ndarray] = {}
        self.gone: dict[str, np.ndarray] = {}
        self.repair = _Repair(plan.graph, self.collector.consumers, how) if how else None
        self.graph = self.repair.graph if self.repair else plan.graph
        self.unmet = Counter[Key](m.key for m in self.graph.observer().pausable if self.collector.wants(m))
        self.waiting = {name: self._readers(name) for name in plan.removal}

    def _readers(self, axis: str) -> set[Key]:
        """What reads an axis and can be stopped before."""
        return {key for key, c in self.collector.consumers.items() if axis in c.labels and self.unmet[key]}

    def run(self, batches: list[Any]) -> None:
        """Take all batches through the model together."""
        calls = list(calls_of(self.plan.graph, batches, "to score with"))
        samples = [samples_in(self.plan.graph, args, kwargs) for args, kwargs in calls]
        observer = self.graph.observer()
        runs = [observer.steps(call, self.collector.wants) for call in calls]
        stands = [next(run, None) for run in runs]
        while any(stand is not None for stand in stands):
            met = self._together(stands)
            consumer = self.collector.consumers[met[0].meeting.key]
            for one, self.collector.samples in zip(met, samples, strict=True):
                self.collector(one)
            self._settle(consumer)
            channels = self._channels(consumer)
            if self.repair is not None and len(channels):
                self.repair(consumer, channels, self.statistics)
            stands = [_onward(run, one, channels) for run, one in zip(runs, met, strict=True)]
        for name in [name for name in self.waiting if self.statistics.readers(name)]:
            self._decide(name)

    def _together(self, stands: list[Met | None]) -> list[Met]:
        met = [stand for stand in stands if stand is not None]
        if len(met) < len(stands) or len({one.meeting.key for one in met}) > 1:
            raise ScoreError(
                f"a batch takes another way through {self.plan.graph.name} than the others, so that they can't stop before the "
                'same operators: use batches of one shape, or propagation="dense"'
            )
        return met

    def _settle(self, consumer: Consumer) -> None:
        """Decide on the axes that this was the last to read."""
        self.unmet[consumer.key] -= 1
        if self.unmet[consumer.key] > 0:
            return
        for name in [name for name in consumer.labels if name in self.waiting]:
            self.waiting[name].discard(consumer.key)
            if not self.waiting[name]:
                self._decide(name)

    def _decide(self, name: str) -> None:
        """Score an axis by what was found of its readers, and say which of its groups are gone from now on."""
        self.collector.require_finite(consumer.key for consumer in self.statistics.readers(name))
        axis = self.plan.graph[name]
        self.scores[name] = self.score.of_axis(axis, self.statistics)
        self.gone[name] = ascending(axis, self.scores[name])[: len(self.plan.removal[name])]
        del self.waiting[name]

    def _channels(self, consumer: Consumer) -> np.ndarray:
        """What comes into a consumer and is gone: positions of channels."""
        gone = np.zeros(consumer.size, dtype=bool)
        for name, labels in consumer.labels.items():
            gone |= np.isin(labels, self.gone.get(name, ()))
        return np.flatnonzero(gone)


def _onward(run: Generator[Met, Tensor | None, None], met: Met, channels: np.ndarray) -> Met | None:
    """Let a batch go on to its next stop, with some channels of what comes in here filled with zeros; None at the end."""
    at = torch.from_numpy(channels).to(met.operand.device)
    try:
        return run.send(met.operand.index_fill(met.meeting.dim, at, 0) if len(channels) else None)
    except StopIteration:
        return None


class _Repair:
    """A copy of a model whose consumers take over what they can of what they lose, before they are run."""

    def __init__(self, graph: DependencyGraph, consumers: Mapping[Key, Consumer], how: Compensation) -> None:
        whole = graph.cut_plan({})
        model = whole.apply(check="none")
        self.how, self.held = how, held_by(model, whole)
        self.readers: dict[Key, tuple[Reader, str | None]] = {}
        for reader in readers_among(consumers.values(), whole):
            if reader.refused or len(reader.consumer.meetings) > 1:
                continue
            target = bias_of(self.held, reader, how)
            if target is not None and not reader.bias:  # before the copy is traced, which must see it
                write_bias(self.held, reader, target, torch.zeros(reader.outputs))
            self.readers[reader.consumer.key] = reader, target
        self.graph = graph.again(model)

    def __call__(self, consumer: Consumer, channels: np.ndarray, found: Statistics) -> None:
        """Let one consumer make up for channels that go, by what was found of them."""
        reader, target = self.readers.get(consumer.key, (None, None))
        if reader is None or self.how.kind == "bias" and target is None:
            return
        columns = (channels[:, None] * reader.window + np.arange(reader.window)[None]).reshape(-1)
        change = change_of(replace(reader, gone=columns), self.how, found, bias=target is not None)
        if change.weight is not None:
            self.held.put(consumer.weight, change.weight)
        if target is not None and change.bias is not None:
            bias = self.held.get(target)
            self.held.put(target, bias + change.bias.to(bias))
