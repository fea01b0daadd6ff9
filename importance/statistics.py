"""Statistics of what comes into the consumers of every axis, gathered in one pass over calibration data.

A consumer is a dim that an operator sums over (`depgraph.consumers`): what a removed group no longer feeds. The captured
program is run (`depgraph.observing`), so that every architecture has them; nothing is kept of a batch but running sums, so
memory doesn't grow with the number of batches, and the order of batches doesn't matter.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.consumers import Meeting, meetings
from depgraph.cutting.sides import Side
from depgraph.errors import DataError, ScoreError
from depgraph.observing import Met
from depgraph.origins import Factors
from importance.accumulators import Statistic, finite
from importance.calling import check_batches, inputs_of, moved, samples_in
from importance.laid_out import Samples
from importance.patches import groups_of, patches
from importance.rows import Rows

Key = tuple[str, int]


@dataclass(frozen=True)
class Consumer:
    """A dim that operators sum over: all that meets one dim of one parameter, or what meets in one operator.

    `size` is the number of channels that come in; `labels` says for each axis which group every channel belongs to, -1 for
    none. `weight` and `weight_dim` are the parameter that the channels are multiplied with; empty where that is no single one.
    `groups` is how many parts of the channels, one after the other, go into outputs of their own, as a convolution's do.
    """

    key: Key
    meetings: tuple[Meeting, ...]
    size: int
    labels: Mapping[str, np.ndarray] = field(repr=False)
    groups: int = 1

    @property
    def weight(self) -> str:
        return self.meetings[0].weight

    @property
    def weight_dim(self) -> int:
        return self.meetings[0].weight_dim

    def __str__(self) -> str:
        return str(self.meetings[0])


def consumers_of(graph: DependencyGraph) -> list[Consumer]:
    """All consumers of a graph's axes, in the order in which the model computes."""
    program = graph.capture.program
    found: dict[Key, list[Meeting]] = defaultdict(list)
    for meeting in meetings(program, graph.nodes):
        found[meeting.key].append(meeting)
    groups = {node.name: groups_of(node) for node in graph.nodes}
    consumers = []
    for key, here in found.items():
        dim = program.values[here[0].operand].dim(here[0].dim)
        number = graph.widths.class_of(dim)
        labels = {name: graph[name].labels[number] for name in graph.widths.axes_of(dim)}
        if labels:
            size, parts = program.relations.sizes[dim], groups[here[0].op] if here[0].weight else 1
            consumers.append(Consumer(key, tuple(here), size, labels, parts or 1))
    return consumers


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


@dataclass(frozen=True)
class Gathering:
    """How statistics are gathered.

    `dtype`: what sums are taken in (float32, or float64). `side`: what is zeroed meanwhile, None for the dense model.
    `axes`: whose consumers are looked at, None for all that may lose a group. `progress`: show a bar on stderr.
    """

    dtype: torch.dtype = torch.float32
    side: Side | None = None
    axes: frozenset[str] | None = None
    progress: bool = False


def collect(
    graph: DependencyGraph, batches: Iterable[Any], statistics: Iterable[Any], how: Gathering | None = None
) -> Statistics:
    """Gather all `statistics` of all consumers in one pass over `batches`.

    `statistics` are statistics (`importance.Moments()`), or estimators, which say what they need. The model runs in eval mode
    without gradients and stays as it is; rows where a batch's attention mask is 0 don't count.

    Raises:
        DataError: there are no batches, one doesn't fit the model, or an index in it points beyond its table.
        ScoreError: NaN or infinity comes into a consumer, which is named.
    """
    check_batches(batches)
    how = how or Gathering()
    wanted = list(dict.fromkeys(s for one in statistics for s in getattr(one, "needs", (one,))))
    collector = Collector(graph, wanted, how)
    device = next((t.device for t in graph.tensors().values()), torch.device("cpu"))
    if device.type == "meta":
        raise ScoreError(f"the weights of {graph.name} are on the meta device and have no values: load them first")
    observer, count = graph.observer(), 0
    with quiet(graph.model):
        for batch in _shown(batches, how):
            args, kwargs = inputs_of(graph.model, moved(batch, device))
            with collector.batch(samples_in(graph, args, kwargs)):
                observer.watch((args, kwargs), watch=collector, side=how.side)
            count += 1
    if not count:
        raise DataError("there are no batches to collect from (a generator gives its batches only once: pass a list)")
    if collector.empty and not collector.found:
        raise DataError("the batches are empty: they hold no row that comes into any consumer, give some with samples")
    if not collector.text:
        raise DataError("the attention masks of all batches are zero everywhere: give some with text")
    collector.require_finite()
    return Statistics(graph, collector.found, count)


class Collector:
    """Sorts what meets into the accumulators of its consumer."""

    def __init__(self, graph: DependencyGraph, wanted: list[Statistic], how: Gathering) -> None:
        prunable = {axis.name for axis in graph.axes if axis.prunable.any()}
        axes = prunable if how.axes is None else how.axes
        self.dtype = how.dtype
        self.consumers = {c.key: c for c in consumers_of(graph) if not axes.isdisjoint(c.labels)}
        self.wanted = wanted
        self.found: dict[Key, dict[Statistic, Any]] = {}
        self.samples = Samples(1)
        self.empty = False
        sources = Counter((m.operand, m.dim) for c in self.consumers.values() for m in c.meetings)
        several = (c.key for c in self.consumers.values() if any(sources[m.operand, m.dim] > 1 for m in c.meetings))
        self._shared = frozenset(several)
        self._last: dict[tuple[Any, ...], tuple[Rows, Tensor, Samples]] = {}
        self._weighed: set[Key] = set()
        self._met: set[Key] = set()
        self._before = 0
        self.text = False

    @contextlib.contextmanager
    def batch(self, samples: Samples) -> Iterator[None]:
        """Within, a batch with these samples is run; they count for a consumer to which nothing of them comes, too."""
        self.samples, self._met = samples, set()
        self.text = self.text or all(bool(text.any()) for _, text in samples.masks)
        yield
        count = samples.count if self._met else 0
        for key in self.found.keys() - self._met:
            self._pass_by(key, count)
        self._before += count

    def _pass_by(self, key: Key, samples: int) -> None:
        for accumulator in self.found[key].values():
            if hasattr(accumulator, "pass_by"):
                accumulator.pass_by(samples)

    def __call__(self, met: Met) -> None:
        consumer = self.consumers.get(met.meeting.key)
        if consumer is None or not met.operand.numel():
            self.empty = self.empty or consumer is not None
            return
        if consumer.key not in self.found:
            self.found[consumer.key] = {statistic: statistic.start(consumer) for statistic in self.wanted}
            self._pass_by(consumer.key, self._before)
        self._met.add(consumer.key)
        here, views = self.found[consumer.key], dict[str, Any]()
        again = met.meeting.stored and met.meeting.key in self._weighed
        for statistic, accumulator in here.items():
            view = getattr(statistic, "view", "channels")
            if view in _OF_WEIGHTS and again:
                continue
            if view not in views:
                views[view] = _VIEWS[view](self, met)
            accumulator.add(views[view])
        self._weighed.add(met.meeting.key)

    def wants(self, meeting: Meeting) -> bool:
        """Is a product looked at?"""
        return meeting.key in self.consumers

    def channels(self, met: Met) -> Rows:
        """What comes in: one column for every channel."""
        several = met.meeting.key in self._shared
        if several or not met.meeting.stored:
            return self._remembered(met.operand, met.meeting.dim, met.operand_from, several)
        tensor, places = _as_stored(met.operand, met.meeting.dim, met.operand_from)
        return self.samples.rows(tensor, -1, self.dtype, places=places)

    def _remembered(self, tensor: Tensor, dim: int, places: Sequence[Factors], several: bool = False) -> Rows:
        """The rows of a tensor: the same as the last time where it was among the last two that were looked at so."""
        if tensor.is_inference():
            return self.samples.rows(tensor, dim, self.dtype, places=places)
        place = (tensor.data_ptr(), tensor.stride(), tensor.shape, tensor._version, dim % tensor.ndim, id(self.samples))
        if place not in self._last:
            stored, given = _as_stored(tensor, dim, places)
            rows = self.samples.rows(stored, -1, self.dtype, several, given)
            before = list(self._last.items())[-1:]
            self._last = dict([*before, (place, (rows, tensor, self.samples))])  # what ids are of stays alive
        return self._last[place][0]

    def columns(self, met: Met) -> Rows:
        """What comes in, one column for every column of the weights: a convolution's windows laid out."""
        windows = patches(met.node, met.operand)
        return self.channels(met) if windows is None else self.samples.rows(windows, 1, self.dtype)

    def weights(self, met: Met) -> Rows:
        """What it is multiplied with: one column for every channel that comes in."""
        if not met.meeting.stored and met.other.shape[met.meeting.other_dim] == met.operand.shape[met.meeting.dim]:
            return self._remembered(met.other, met.meeting.other_dim, met.other_from)
        other = met.other.movedim(met.meeting.other_dim, -1)
        size, own = met.operand.shape[met.meeting.dim], other.shape[-1]
        if own != size:  # every group of a convolution has channels of its own
            groups = size // own
            other = other.reshape(groups, -1, own).transpose(0, 1).reshape(-1, size)
        return (Samples(1) if met.meeting.stored else self.samples).rows(other, -1, self.dtype)

    def outputs(self, met: Met) -> Tensor:
        """What it is multiplied with: [groups, outputs, channels, places], a convolution's window being places."""
        parts = groups_of(met.node)
        if not met.meeting.stored or parts is None or met.meeting.other_dim > 1:
            return self.weights(met).flat[None, :, :, None]
        weight = met.other.to(torch.promote_types(met.other.dtype, self.dtype)).flatten(2)
        if met.meeting.other_dim == 1:
            return weight.unflatten(0, (parts, -1))
        return weight.flatten(1).unflatten(0, (parts, -1)).mT[..., None]

    def both(self, met: Met) -> tuple[Rows, Rows]:
        """What comes in, and what it is multiplied with."""
        return self.channels(met), self.weights(met)

    def require_finite(self, keys: Iterable[Key] | None = None) -> None:
        """Raise ScoreError for the first consumer (of `keys`, or of all) into which something came that is NaN or infinite."""
        for key in self.found if keys is None else keys:
            for accumulator in self.found.get(key, {}).values():
                if not finite(accumulator):
                    raise ScoreError(
                        f"NaN or infinity comes in at {self.consumers[key]}: look at the weights before it and at the batches"
                    )


def _as_stored(tensor: Tensor, dim: int, places: Sequence[Factors]) -> tuple[Tensor, Sequence[Factors]]:
    """A tensor's dims but the first in the order of its memory, `dim` last, and where these come from.

    Rows of a sample in any order need no copy then.
    """
    dim %= tensor.ndim
    strides = tensor.stride()
    rest = sorted((d for d in range(1, tensor.ndim) if d != dim), key=lambda d: -strides[d])
    order = [*([0] if dim else []), *rest, dim]
    return tensor.permute(*order), [places[d] for d in order] if len(places) == tensor.ndim else ()


_OF_WEIGHTS = ("weights", "outputs")
_VIEWS: dict[str, Callable[[Collector, Met], Any]] = {
    "channels": Collector.channels,
    "columns": Collector.columns,
    "weights": Collector.weights,
    "outputs": Collector.outputs,
    "both": Collector.both,
}


def _shown(batches: Iterable[Any], how: Gathering) -> Iterable[Any]:
    if not how.progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(batches, "collecting statistics", console=Console(stderr=True), transient=True)


def channel_scores(consumer: Consumer, values: Tensor) -> np.ndarray:
    """One number per channel of a consumer, float64, checked to be as many as it has."""
    array = values.detach().cpu().double().numpy()
    if array.shape != (consumer.size,):
        raise ScoreError(f"{consumer} has {consumer.size} channels, but a score has shape {array.shape}")
    return array
