"""What calibration data say of a model's repeated blocks: how much each changes its residual stream, how many outliers it has.

The numbers that allocations spread a budget over blocks by: ShortGPT's block influence (METHODS.md 2.6), CFSP's angular
distance (2.12), Adapt-Pruner's cosine (2.16), OWL's outlier ratio (2.17). Each is found from one forward pass, for any blocks
that `importance.allocations.blocks` finds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.errors import ScoreError
from depgraph.observing import Met
from depgraph.paths import is_in
from importance.allocations.blocks import blocks
from importance.calling import calls_of, check_batches, samples_in
from importance.choices import pick
from importance.laid_out import Samples
from importance.passages import Passage, passages

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "influence": lambda cosines: 1 - cosines,
    "angular": lambda cosines: torch.arccos(cosines.clamp(-1, 1)) / math.pi,
}
"""Distances of what comes into a block and what it puts out, by their cosines: 0 where they point the same way."""
_PURPOSE = "to look at blocks with"


@dataclass(frozen=True)
class BlockChange:
    """How much every block changes what comes in on its residual stream: the mean over tokens (or pixels) of a distance.

    Called with a graph, it gives a dict of block to number, the larger the more important: what `Cfsp(BlockChange(batches,
    "angular"))` and `AdaptPruner(BlockChange(batches))` take. Adapt-Pruner's importance, minus the mean cosine, differs from the
    influence by a constant, which its centring takes out. Padding doesn't count. A block that puts out another shape than
    anything that comes in has the distance of a right angle.

    Args:
        batches: tensors, tuples of arguments or dicts of keyword arguments.
        measure: "influence" (1 - cosine: ShortGPT's BI) or "angular" (arccos(cosine) / pi).

    Raises, when called: DataError as `importance.collect` does; ScoreError where a block puts out NaN or infinity, or the
    model has no repeated blocks.
    """

    batches: Iterable[Any]
    measure: str = "influence"

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(MEASURES, self.measure, "measure of a block's change")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        distance = MEASURES[self.measure]
        names = _blocks(graph)
        found = {passage.block: passage for passage in passages(graph, names)}
        pairs = _Pairs(list(found.values()), distance)
        observer = graph.observer()
        with quiet(graph.model):
            for args, kwargs in calls_of(graph, self.batches, _PURPOSE):
                pairs.samples = samples_in(graph, args, kwargs)
                observer.watch((args, kwargs), seen=pairs.seen)
        still = float(distance(torch.zeros(())))
        return {name: pairs.mean(name) if name in found else still for name in names}


@dataclass(frozen=True)
class OutlierRatios:
    """OWL's LOD of every block: the per cent of its Wanda scores |W_ij| ||X_j|| above `times` their mean.

    Called with a graph, it gives what `Owl(OutlierRatios(batches))` takes. The weights are those that something computed is
    multiplied with within the block; windows of a convolution count by the channel that they are of.

    Raises, when called, as `BlockChange` does; ScoreError at once where `times` is no finite number above 0.
    """

    batches: Iterable[Any]
    times: float = 5.0

    def __post_init__(self) -> None:
        check_batches(self.batches)
        if not 0 < self.times < math.inf:
            raise ScoreError(f"outliers are {self.times!r} times the mean: give a finite number above 0")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        names, squares = _blocks(graph), _Squares()
        observer = graph.observer()
        with quiet(graph.model):
            for args, kwargs in calls_of(graph, self.batches, _PURPOSE):
                squares.samples = samples_in(graph, args, kwargs)
                observer.watch((args, kwargs), watch=squares)
        tensors = graph.tensors()
        found: dict[str, list[tuple[Tensor, Tensor, int]]] = {name: [] for name in names}
        for (weight, dim), sums in squares.sums.items():
            for name in (n for n in names if is_in(graph.owner_of(weight), n)):
                found[name].append((tensors[weight].detach(), sums.sqrt(), dim))
        return {name: self._ratio(name, weights) for name, weights in found.items()}

    def _ratio(self, block: str, weights: list[tuple[Tensor, Tensor, int]]) -> float:
        count = max(sum(weight.numel() for weight, _, _ in weights), 1)
        limit = self.times * sum(float(_wanda(*each).double().sum()) for each in weights) / count
        if not math.isfinite(limit):
            raise ScoreError(
                f"NaN or infinity comes into a weight of block {block!r}: look at the batches and the weights"
            )
        return 100.0 * sum(int((_wanda(*each) > limit).sum()) for each in weights) / count


def _wanda(weight: Tensor, norms: Tensor, dim: int) -> Tensor:
    """|W_ij| ||X_j||: a weight, the norms [channels] of what comes in at its dim `dim` (of every group, if there are some)."""
    sizes = weight.abs().to(norms).movedim(dim, -1)
    own = sizes.shape[-1]
    return sizes.unflatten(0, (len(norms) // own, -1)) * norms.reshape(-1, *[1] * (sizes.ndim - 1), own)


def _blocks(graph: DependencyGraph) -> list[str]:
    names = blocks(graph)
    if not names:
        raise ScoreError(
            f"{graph.name} has no blocks that are repeated, numbered, in one container, to spread the budget over: take a recipe or an "
            "allocation without blocks (such as flap or obs), or give this one numbers by axis"
        )
    return names


class _Pairs:
    """Sums over tokens of how far what comes into a block is from what it puts out."""

    def __init__(self, passages: list[Passage], distance: Callable[[Tensor], Tensor]) -> None:
        self.distance = distance
        self.samples = Samples(1)
        self.ends: dict[str, list[Passage]] = defaultdict(list)
        for passage in passages:
            self.ends[passage.leaves].append(passage)
        self.starts = Counter(passage.enters for passage in passages)
        self.seen = {name: self._watch(name) for name in (*self.starts, *self.ends)}
        self.held: dict[str, tuple[int, Tensor]] = {}
        self.total: dict[str, float] = defaultdict(float)
        self.count: dict[str, int] = defaultdict(int)

    def _watch(self, name: str) -> Callable[[Tensor], None]:
        def see(made: Tensor) -> None:
            for passage in self.ends.get(name, ()):
                left, before = self.held[passage.enters]
                self._add(passage, before, made)
                self.held[passage.enters] = left - 1, before
                if left == 1:
                    del self.held[passage.enters]
            if name in self.starts:
                self.held[name] = self.starts[name], made.clone()

        return see

    def _add(self, passage: Passage, before: Tensor, after: Tensor) -> None:
        one, other = (self.samples.rows(t, passage.channels, torch.float64).flat for t in (before, after))
        same = ~(one.any(dim=1) | other.any(dim=1))
        cosines = functional.cosine_similarity(one, other, dim=1).masked_fill(same, 1.0)
        self.total[passage.block] += self.distance(cosines).sum().item()
        self.count[passage.block] += len(cosines)

    def mean(self, block: str) -> float:
        """The mean distance of a block; raises ScoreError where it isn't finite."""
        found = self.total[block] / max(self.count[block], 1)
        if not math.isfinite(found):
            raise ScoreError(f"block {block!r} puts out NaN or infinity: look at its weights and at the batches")
        return float(found)


@dataclass
class _Squares:
    """Sums of squares of what comes into every weight, by the weight and the dim of it that is summed over: [channels]."""

    samples: Samples = field(default_factory=lambda: Samples(1))
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __call__(self, met: Met) -> None:
        if met.meeting.stored and met.meeting.weight:
            rows = self.samples.rows(met.operand, met.meeting.dim, torch.float32, places=met.operand_from).flat
            key = met.meeting.key
            self.sums[key] = rows.square().sum(dim=0) + self.sums.get(key, 0)
