"""Where what comes into consumers is sorted: into running sums, one for each statistic that was asked for."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from depgraph import DependencyGraph
from depgraph.consumers import Meeting
from depgraph.cutting.mutating import writes
from depgraph.cutting.sides import Side
from depgraph.errors import ScoreError
from depgraph.observing import Met
from depgraph.origins import Factors
from importance.accumulators import Statistic, finite
from importance.consumers import Consumer, Key, consumers_of
from importance.laid_out import Samples
from importance.patches import groups_of, patches
from importance.rows import Rows


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
        self._alike = {} if _writes_within(graph) else _leaders(self.consumers.values(), graph.nodes)
        self._lead({})
        self._last: dict[tuple[Any, ...], tuple[Rows, Tensor, Samples]] = {}
        self._weighed: set[Key] = set()
        self._met: set[Key] = set()
        self._before = 0
        self.text = False

    @contextlib.contextmanager
    def batch(self, samples: Samples) -> Iterator[None]:
        """Within, a batch with these samples is run; they count for a consumer to which nothing of them comes, too.

        While all captures are as the graph's own, what comes into several consumers is summed for the first of them.
        """
        if not self.found:
            self._lead(self._alike)
        self.samples, self._met = samples, set()
        self.text = self.text or all(bool(text.any()) for _, text in samples.masks)
        yield
        count = samples.count if self._met else 0
        for key in self.found.keys() - self._met:
            self._pass_by(key, count)
        self._before += count

    def _lead(self, leaders: Mapping[Key, _Leader]) -> None:
        """Let these sum for others, and rows that several of the rest take in be made once."""
        self._leaders = leaders
        alone = [consumer for key, consumer in self.consumers.items() if key not in leaders]
        sources = Counter((m.operand, m.dim) for consumer in alone for m in consumer.meetings)
        self._shared = frozenset(c.key for c in alone if any(sources[m.operand, m.dim] > 1 for m in c.meetings))

    def _part(self) -> None:
        """From now on each sums for itself: other captures may give something else to those that were alike."""
        for key in self._leaders.keys() & self.found.keys():
            self.found[key] = copy.deepcopy(self.found[key])
        self._alike = {}
        self._lead({})

    def _pass_by(self, key: Key, samples: int) -> None:
        for accumulator in self._own(key).values():
            if hasattr(accumulator, "pass_by"):
                accumulator.pass_by(samples)

    def _own(self, key: Key) -> dict[Statistic, Any]:
        """The accumulators of a consumer that are no other one's."""
        theirs = self._leaders[key].views if key in self._leaders else _NOTHING
        return {statistic: one for statistic, one in self.found[key].items() if _view(statistic) not in theirs}

    def _start(self, consumer: Consumer) -> None:
        """Make its accumulators: those of its leader for what comes in, where it has one."""
        here = {statistic: statistic.start(consumer) for statistic in self.wanted}
        if consumer.key in self._leaders:
            leader = self._leaders[consumer.key]
            here |= {s: one for s, one in self.found[leader.key].items() if _view(s) in leader.views}
        self.found[consumer.key] = here
        self._pass_by(consumer.key, self._before)

    def __call__(self, met: Met) -> None:
        consumer = self.consumers.get(met.meeting.key)
        if consumer is None or not met.operand.numel():
            self.empty = self.empty or consumer is not None
            return
        if self._leaders and not met.same:
            self._part()
        key = consumer.key
        if key not in self.found:
            self._start(consumer)
        self._met.add(key)
        done = self._done(met)
        views: dict[str, Any] = {}
        for statistic, accumulator in self.found[key].items():
            view = _view(statistic)
            if view in done:
                continue
            if view not in views:
                views[view] = _VIEWS[view](self, met)
            accumulator.add(views[view])
        self._weighed.add(key)

    def _done(self, met: Met) -> frozenset[str]:
        """The views of which all was taken in before: a weight's, and what its leader took in."""
        key = met.meeting.key
        weighed = _OF_WEIGHTS if met.meeting.stored and key in self._weighed else _NOTHING
        return weighed | self._leaders[key].views if key in self._leaders else weighed

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
        windows = None if met.meeting.second else patches(met.node, met.operand)
        return self.channels(met) if windows is None else self.samples.rows(windows, 1, self.dtype)

    def weights(self, met: Met) -> Rows:
        """What it is multiplied with: one column for every channel that comes in."""
        if not met.meeting.stored and met.other.shape[met.meeting.other_dim] == met.operand.shape[met.meeting.dim]:
            return self._remembered(met.other, met.meeting.other_dim, met.other_from)
        other = met.other.movedim(met.meeting.other_dim, -1)
        size, own = met.operand.shape[met.meeting.dim], other.shape[-1]
        if own > size:  # a computed weight meets those of every group of a convolution
            other = other.unflatten(-1, (-1, size))
        elif own != size:  # every group of a convolution has channels of its own
            groups = size // own
            other = other.reshape(groups, -1, own).transpose(0, 1).reshape(-1, size)
        return (Samples(1) if met.meeting.stored else self.samples).rows(other, -1, self.dtype)

    def outputs(self, met: Met) -> Tensor:
        """What it is multiplied with: [groups, outputs, channels, places], a convolution's window being places."""
        parts = groups_of(met.node)
        if not met.meeting.stored or parts is None or met.meeting.second or met.meeting.other_dim > 1:
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
    dim %= max(tensor.ndim, 1)
    if dim >= tensor.ndim - 1 and tensor.is_contiguous():
        return tensor, places
    strides = tensor.stride()
    rest = sorted((d for d in range(1, tensor.ndim) if d != dim), key=lambda d: -strides[d])
    order = [*([0] if dim else []), *rest, dim]
    return tensor.permute(*order), [places[d] for d in order] if len(places) == tensor.ndim else ()


def _writes_within(graph: DependencyGraph) -> bool:
    """Is memory of something that was computed written to, so that the same value may hold other numbers later?"""
    found = writes(node for node in graph.nodes if isinstance(node, Node))
    return any(write.root.op == "call_function" for write in found)


class _Leader(NamedTuple):
    """The consumer that sums for another one what it has in common with it: by these views of what comes in."""

    key: Key
    views: frozenset[str]


def _leaders(consumers: Iterable[Consumer], nodes: Iterable[Any]) -> dict[Key, _Leader]:
    """Consumers into which the same comes, of the same values in the same order, as into another: that one.

    The columns of convolutions are windows, of which each has its own.
    """
    windows = {node.name for node in nodes if groups_of(node) is not None}
    first: dict[tuple[Any, ...], Key] = {}
    found = {}
    for one in consumers:
        into = (one.size, *((m.operand, m.dim, m.stored, m.op in windows) for m in one.meetings))
        key = first.setdefault(into, one.key)
        if key != one.key and all(m.stored for m in one.meetings):
            slides = any(m.op in windows for m in one.meetings)
            found[one.key] = _Leader(key, _INCOMING - {"columns"} if slides else _INCOMING)
    return found


def _view(statistic: Statistic) -> str:
    view: str = getattr(statistic, "view", "channels")
    return view


_NOTHING: frozenset[str] = frozenset()
_INCOMING = frozenset(["channels", "columns"])
_OF_WEIGHTS = frozenset(["weights", "outputs"])
_VIEWS: dict[str, Callable[[Collector, Met], Any]] = {
    "channels": Collector.channels,
    "columns": Collector.columns,
    "weights": Collector.weights,
    "outputs": Collector.outputs,
    "both": Collector.both,
}
