"""Statistics of what comes into the consumers of every axis, gathered in one pass over calibration data.

The captured program is run (`depgraph.observing`), so that every architecture has them; nothing is kept of a batch but running
sums, so memory doesn't grow with the number of batches, and the order of batches doesn't matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.errors import DataError, ScoreError
from depgraph.scoring import require_graph
from importance.accumulators import Statistic
from importance.calling import calls_of, check_batches, device_of, samples_in
from importance.collector import Collector, Gathering
from importance.consumers import Consumer, Key, consumers_of
from importance.progress import shown


@dataclass(frozen=True)
class Statistics:
    """What one pass found: for each consumer, an accumulator for every statistic that was asked for."""

    graph: DependencyGraph = field(repr=False)
    found: Mapping[Key, Mapping[Statistic, Any]] = field(repr=False)
    batches: int = 0

    def of(self, consumer: Consumer, statistic: Statistic) -> Any:
        """The accumulator of one consumer.

        Raises ScoreError when the statistic wasn't asked for.
        """
        here = self.found.get(consumer.key, {})
        if statistic not in here:
            raise ScoreError(
                f"{statistic} of {consumer} was not collected: give it to importance.collect(graph, batches, [...]) too"
            )
        return here[statistic]

    @cached_property
    def consumers(self) -> list[Consumer]:
        """The consumers of the graph's axes."""
        return consumers_of(self.graph)

    @cached_property
    def _by_axis(self) -> Mapping[str, list[Consumer]]:
        by_axis: dict[str, list[Consumer]] = defaultdict(list)
        for consumer in self.consumers:
            for axis in consumer.labels:
                by_axis[axis].append(consumer)
        return by_axis

    def readers(self, axis: str) -> list[Consumer]:
        """The consumers that read an axis, as far as something was found of them."""
        return [consumer for consumer in self._by_axis.get(axis, ()) if consumer.key in self.found]


def collect(
    graph: DependencyGraph, batches: Iterable[Any], statistics: Iterable[Any], how: Gathering | None = None
) -> Statistics:
    """Gather all `statistics` of all consumers in one pass over `batches`.

    `statistics` are statistics (`importance.Moments()`), or estimators, which say what they need. The model runs in eval mode
    without gradients and stays as it is; rows where a batch's attention mask is 0 don't count.

    Raises:
        DataError: there are no batches, one doesn't fit the model, or an index in it points beyond its table.
        ScoreError: NaN or infinity comes into a consumer, which is named, or `graph` is none.
    """
    require_graph(graph)
    check_batches(batches)
    how = how or Gathering()
    wanted = list(dict.fromkeys(s for one in statistics for s in getattr(one, "needs", (one,))))
    collector = Collector(graph, wanted, how)
    if device_of(graph.tensors().values()).type == "meta":
        raise ScoreError(f"the weights of {graph.name} are on the meta device and have no values: load them first")
    observer, count = graph.observer(), 0
    with quiet(graph.model):
        for args, kwargs in calls_of(graph, shown(batches, "collecting statistics", how.progress), "to collect from"):
            with collector.batch(samples_in(graph, args, kwargs)):
                observer.watch((args, kwargs), watch=collector, side=how.side)
            count += 1
    if collector.empty and not collector.found:
        raise DataError("the batches are empty: they hold no row that comes into any consumer, give some with samples")
    if not collector.text:
        raise DataError("the attention masks of all batches are zero everywhere: give some with text")
    collector.require_finite()
    return Statistics(graph, collector.found, count)
