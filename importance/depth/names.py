"""Depth scores and searches by name, as the command takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from depgraph.errors import ScoreError
from depgraph.scoring import Depth
from importance.choices import pick
from importance.depth.comparing import LossIncrease
from importance.depth.engine import Batches
from importance.depth.greedy import FinerCut, Sleb
from importance.depth.influence import BlockInfluence
from importance.depth.metrics import LossMetric, Metric
from importance.depth.pairs import PairSearch
from importance.depth.shift import OutputShift
from importance.depth.weights import DepthMagnitude, DepthRandom, DepthTaylor
from importance.losses import GIVE, Loss


@dataclass(frozen=True)
class Given:
    """What a method by name may use: `of` is "blocks" or "branches", a `metric` that of the loss where one was given."""

    of: str
    batches: Batches
    loss: Loss | None
    seed: int

    @property
    def metric(self) -> Metric | None:
        return None if self.loss is None else LossMetric(self.loss, nonnegative=False)


_WITHOUT_DATA: dict[str, Callable[[Given], Depth]] = {
    "random": lambda given: DepthRandom(given.seed, given.of),
    "magnitude": lambda given: DepthMagnitude(of=given.of),
}
_METHODS: dict[str, Callable[[Given], Depth]] = _WITHOUT_DATA | {
    "taylor": lambda given: DepthTaylor(given.batches, given.loss, of=given.of),
    "shortgpt": lambda given: BlockInfluence(given.batches, given.of),
    "loss": lambda given: LossIncrease(given.batches, given.of, given.metric),
    "shift": lambda given: OutputShift(given.batches, given.of),
    "sleb": lambda given: Sleb(given.batches, metric=given.metric),
    "finercut": lambda given: FinerCut(given.batches),
    "pairs": lambda given: PairSearch(given.batches, given.of, given.metric),
}
_OF = {"sleb": "blocks", "finercut": "branches"}


def depth_names() -> tuple[str, ...]:
    """All names; those that rank either take ":branches" or ":blocks" behind."""
    return tuple(_METHODS)


def depth_needs_data(name: str) -> bool:
    """Does a method look at batches?"""
    return name.partition(":")[0] not in _WITHOUT_DATA


def depth_named(name: str, batches: Any = None, loss: Loss | None = None, seed: int = 0) -> Depth:
    """A score or search by name, "sleb", "shortgpt" or "shortgpt:branches" (blocks if nothing is said).

    Raises ScoreError: an unknown name, blocks or branches where a method ranks the others only, or no batches where it needs them.
    """
    method, _, of = name.partition(":")
    make = pick(_METHODS, method, "depth score")
    only = _OF.get(method, of or "blocks")
    if of and of not in ("blocks", "branches") or of and of != only:
        raise ScoreError(
            f"depth score {name!r}: {method} ranks {only}"
            if method in _OF
            else f"{of!r} is no kind of part: say blocks or branches"
        )
    if depth_needs_data(name) and batches is None:
        raise ScoreError(f"depth score {name!r} needs calibration data: {GIVE}")
    return make(Given(only, batches, loss, seed))
