"""Angular distance over spans of blocks: the n blocks in a row that turn the last token least."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.blocks import Block
from depgraph.errors import ScoreError
from importance.calling import check_batches
from importance.depth.candidates import parts_of, require_count
from importance.depth.engine import Batches
from importance.depth.order import Counted, Order, Step
from importance.depth.streams import Stream, cosine, streams


def angle(a: Tensor, b: Tensor) -> Tensor:
    """arccos of the cosine over the last dim, divided by pi: 0.5 for orthogonal vectors, 1 for opposite ones."""
    return torch.arccos(cosine(a, b)) / math.pi


@dataclass(frozen=True)
class AngularSpan:
    """d(l, n) of "The Unreasonable Ineffectiveness of the Deeper Layers" (METHODS.md 2.8), by the name of block l.

    The angle, over pi, between the input of block l and what leaves block l + n - 1, of the last token that is no padding (by
    an `attention_mask` [samples, tokens]), as a mean over samples; streams without a dim of tokens are taken at all places.
    Spans lie within one container, each block reading what the one before gives.

    Raises ScoreError, when called: no blocks, or no span of `length`. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    length: int = 1

    def __post_init__(self) -> None:
        check_batches(self.batches)
        if self.length < 1:
            raise ScoreError(f"a span has at least one block, not {self.length}")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        spans = self.spans(graph)
        sums, count, found = dict.fromkeys(spans, 0.0), 0, Counted()
        names = tuple(dict.fromkeys(name for span in spans.values() for name in (span[0], span[-1])))
        for batch in streams(graph, self.batches, names):
            size = 0
            for name, span in spans.items():
                turned = angle(
                    _token(batch[name], batch[name].entering), _token(batch[span[-1]], batch[span[-1]].leaving)
                )
                sums[name] += float(turned.mean()) * len(turned)
                size = len(turned)
            count += size
            found.evaluations += len(parts_of(graph, "blocks"))
        found.update({name: total / count for name, total in sums.items()})
        return found

    def spans(self, graph: DependencyGraph) -> dict[str, tuple[str, ...]]:
        """The spans of `length` blocks, by the name of the first."""
        blocks = parts_of(graph, "blocks")
        require_count(self.length, len(blocks), "blocks")
        runs = [blocks[k : k + self.length] for k in range(len(blocks) - self.length + 1)]
        found = {run[0].name: tuple(b.name for b in run) for run in runs if _in_a_row(graph, run)}  # type: ignore[arg-type]
        if not found:
            raise ScoreError(
                f"no {self.length} of the {len(blocks)} blocks of {graph.name} follow one another: ask for fewer"
            )
        return found


@dataclass(frozen=True)
class AngularDrop:
    """Removes the span of blocks with the smallest `AngularSpan`; the value of all its steps is that distance.

    Raises as `AngularSpan` does.
    """

    batches: Batches = field(repr=False)

    def __post_init__(self) -> None:
        check_batches(self.batches)

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order:
        require_count(count, len(parts_of(graph, "blocks")), "blocks")
        if not count:
            return Order((), 0.0, 0)
        spans = AngularSpan(self.batches, count)
        found = spans(graph)
        first, cost = min(found, key=found.__getitem__), getattr(found, "evaluations", 0)
        return Order(tuple(Step(name, found[first], cost) for name in spans.spans(graph)[first]), 0.0, cost)


@dataclass(frozen=True)
class BeforeLast:
    """The paper's simple heuristic: removes the blocks before the last one, which stays; it looks at no data.

    Raises ScoreError, when called: no blocks, or not more than `count`.
    """

    def __call__(self, graph: DependencyGraph, count: int, /) -> Order:
        names = [block.name for block in parts_of(graph, "blocks")]
        require_count(count, len(names) - 1, "blocks")
        going = names[len(names) - 1 - count : -1]
        return Order(tuple(Step(name, math.nan, 0) for name in going), math.nan, 0)


def _in_a_row(graph: DependencyGraph, run: tuple[Block, ...]) -> bool:
    """Does each block of one container read what the one before gives?"""
    flow = graph.residual.flow
    named = {node.name: node for node in flow.nodes}
    pairs = zip(run, run[1:], strict=False)
    return all(
        a.container == b.container and flow.original(named[b.input]) is flow.original(named[a.output]) for a, b in pairs
    )


def _token(stream: Stream, values: Tensor) -> Tensor:
    """The last token [samples, features] that isn't padding; all places [places, features] where there is no dim of tokens."""
    if values.ndim != 3:
        return values.reshape(-1, values.shape[-1])
    if stream.mask is None:
        return values[:, -1]
    places = torch.arange(values.shape[1], device=values.device)
    last = torch.where(stream.mask != 0, places, -1).amax(dim=1)
    return values[torch.arange(len(values), device=values.device), last]
