"""LaCo: the weights of layers that go are merged into one that stays, as long as the model's last hidden states keep their direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from depgraph import DependencyGraph
from depgraph.blocks import Block
from depgraph.errors import ScoreError
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.batches import Given, given
from importance.depth.candidates import parts_of
from importance.depth.engine import Batches
from importance.depth.programs import Way
from importance.gradients import require_module

State = Mapping[str, Tensor]


def _differences(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    return first + sum((other - first for other in others), torch.zeros_like(first))


def _telescoped(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    return others[-1].clone() if others else first.clone()


MODES = {"paper": _differences, "reference": _telescoped}


def merged(states: Sequence[State], mode: str = "paper") -> dict[str, Tensor]:
    """The parameters of several alike layers as those of the first (METHODS.md 2.10).

    `states` have the parameters of each layer under the same names. Of a matrix (two dims or more) t "paper" gives t_0 +
    sum_k (t_k - t_0); "reference" what the published code gives, whose sum is taken from a base that moves: the last one. Norms
    and biases stay those of the first.

    Raises ScoreError for no layers, an unknown mode, or layers of different names or shapes.
    """
    take = pick(MODES, mode, "mode of merging")
    if not states:
        raise ScoreError("there are no layers to merge: give the parameters of one or more")
    first, *others = states
    for other in others:
        if {n: t.shape for n, t in other.items()} != {n: t.shape for n, t in first.items()}:
            raise ScoreError("layers can be merged only when their parameters have the same names and shapes")
    return {
        name: take(tensor.detach(), [other[name].detach() for other in others]) if tensor.ndim > 1 else tensor.detach()
        for name, tensor in first.items()
    }


@dataclass(frozen=True)
class Merge:
    """`gone` were merged into `into`; `cosine` is that of the last hidden states with the whole model's."""

    into: str
    gone: tuple[str, ...]
    cosine: float


@dataclass(frozen=True)
class Merging:
    """Accepted merges, in order, and the new values of the parameters that they change, by their names in the model."""

    merges: tuple[Merge, ...]
    state: dict[str, Tensor]

    @property
    def gone(self) -> tuple[str, ...]:
        """All blocks that go."""
        return tuple(name for merge in self.merges for name in merge.gone)


@dataclass(frozen=True)
class Laco:
    """LaCo's layer collapse (METHODS.md 2.10): from the top down, `layers` blocks become one where the model stays itself.

    A merge is accepted where the mean cosine, over samples, of the stream behind the last block [tokens * features] with the
    whole model's is above `threshold`; then the next is tried `interval` blocks further down, else one. The blocks are those of
    the container with most of them, `low` and `high` the first and last that take part (None: all). The model isn't changed.

    Raises ScoreError: a number out of range or an unknown mode; when called, no blocks, fewer than `layers` between `low` and
    `high`, or blocks that aren't alike. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    layers: int = 2
    threshold: float = 0.6
    interval: int = 1
    low: int = 0
    high: int | None = None
    mode: str = "paper"

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(MODES, self.mode, "mode of merging")
        if self.layers < 2 or self.interval < 1 or self.low < 0:
            raise ScoreError(
                f"layers must be 2 or more, interval 1 or more and low 0 or more: they are {self.layers}, {self.interval}, {self.low}"
            )

    def __call__(self, graph: DependencyGraph, /) -> Merging:
        require_module(graph, type(self).__name__, "the modules of its blocks")
        blocks = _longest(parts_of(graph, "blocks"))  # type: ignore[arg-type]
        high = len(blocks) - 1 if self.high is None else self.high
        if not self.low <= high - self.layers + 1 <= high < len(blocks):
            raise ScoreError(
                f"{self.layers} blocks from {self.low} to {high} can't be merged: there are {len(blocks)}, numbered from 0"
            )
        trial = _Trial(graph, self.batches, blocks)
        alive, at, merges, partners = (
            [block.name for block in blocks],
            high - self.layers + 1,
            list[Merge](),
            self.layers - 1,
        )
        changed: dict[str, Tensor] = {}
        while at >= self.low:
            into, *gone = alive[at : at + self.layers]
            new = changed | trial.merged([into, *gone], changed, self.mode)
            cosine = trial.cosine(new, {*(n for m in merges for n in m.gone), *gone})
            if cosine > self.threshold:
                changed = {n: t for n, t in new.items() if not any(n.startswith(f"{name}.") for name in gone)}
                merges.append(Merge(into, tuple(gone), cosine))
                alive = [name for name in alive if name not in gone]
                at = min(at - self.interval, len(alive) - 1 - partners)
            else:
                at -= 1
        return Merging(tuple(merges), changed)


class _Trial:
    """The model with merged blocks, run without the others."""

    def __init__(self, graph: DependencyGraph, batches: Iterable[Any], blocks: Sequence[Block]) -> None:
        self.blocks = {block.name: block for block in blocks}
        self.tensors = graph.tensors()
        own = dict(graph.model.named_parameters(remove_duplicate=False))
        self.names = {b: [n for n in own if n.startswith(f"{b}.")] for b in self.blocks}
        self.data = given(graph, batches, self.blocks)
        self.dense = [self._stream(data, {}, set()) for data in self.data]

    def merged(self, names: Sequence[str], changed: State, mode: str) -> dict[str, Tensor]:
        """The parameters of the first of the named blocks with the others merged into it, by their names in the model."""
        held = {**{n: self.tensors[n] for b in names for n in self.names[b]}, **changed}
        states = [{n.removeprefix(f"{b}."): held[n] for n in self.names[b]} for b in names]
        return {f"{names[0]}.{n}": tensor for n, tensor in merged(states, mode).items() if tensor.ndim > 1}

    def cosine(self, state: State, gone: set[str]) -> float:
        """The mean cosine of the last hidden states with those of the whole model."""
        found = [
            F.cosine_similarity(self._stream(data, state, gone), dense, dim=1)
            for data, dense in zip(self.data, self.dense, strict=True)
        ]
        return float(torch.cat(found).mean())

    def _stream(self, data: Given, state: State, gone: set[str]) -> Tensor:
        """What the last block gives, or what goes on in its place: [samples, all else]."""
        blocks = {block.name: block for block in data.way.graph.blocks}
        last = [blocks[name] for name in self.blocks]
        end = last[-1].output
        for block in reversed(last):
            if block.name in gone and data.way.graph.residual.flow.original(self._node(data, end)).name == block.output:
                end = block.input
        assert isinstance(data.way, Way)
        part, made = data.way.part(frozenset(gone)), list[Tensor]()
        part.run(data.leaves, seen={end: made.append}, state=state)
        return made[0].double().flatten(1)

    def _node(self, data: Given, name: str) -> torch.fx.Node:
        return next(node for node in data.way.graph.residual.flow.nodes if node.name == name)


def _longest(blocks: Sequence[Block]) -> list[Block]:
    """The blocks of the container that has most of them."""
    containers = [block.container for block in blocks]
    most = max(dict.fromkeys(containers), key=containers.count)
    return [block for block in blocks if block.container == most]
