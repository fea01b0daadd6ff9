"""Which blocks and branches a build may leave out, and by what: one after another, or in competition with groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from torch import nn

from depgraph.cutting.shortening import shortening_of
from depgraph.dependency import DependencyGraph
from depgraph.errors import CutError, DataError, PlanError, ScoreError
from depgraph.scoring import Depth, Scorer, checked_depth, is_search
from exporters.building.asked import BOTH, Subject, Ways
from importance.depth import InLoss, LossMetric, depth_named
from importance.remembered import Remembered, RememberedSearch

_FEW, _SLEB_NEEDS = 8, 4  # batches to choose blocks by; blocks, as the first and the last one stay there
_RISES = "loss:branches"


@dataclass
class Leaving:
    """What blocks, or branches, are worth; all of it is worked out once."""

    graph: DependencyGraph
    subject: Subject
    ways: Ways
    notes: list[str]
    _in_loss: dict[int, Remembered] = field(default_factory=dict)

    @cached_property
    def depth(self) -> Depth | None:
        """What says which blocks go (branches, in a model without blocks); None where none can or may."""
        named, options = self.ways.depth, self.ways.options
        kept = named == "auto" and (options.get("only") or options.get("protect"))
        if named == "none" or kept or not any(self.ways.depth_shares):
            return None
        if not self.graph.branches:
            self.notes += (
                [] if named == "auto" else [f"{self.graph.name} has no blocks that could be left out by {named}"]
            )
            return None
        return self._tried(self._usual() if named == "auto" else named)

    @cached_property
    def rises(self) -> Depth | None:
        """What the loss rises by without each, which changes by groups compare with; None where that isn't known or asked for."""
        named = self.ways.depth
        if BOTH not in self.ways.depth_shares or self.depth is None or self.batches is None:
            return None
        if not self._is_module:
            if self.ways.depth_shares == (BOTH,):
                raise ScoreError(
                    f"blocks and groups compete by changes of the loss, which {self.graph.name}, an ONNX file, doesn't give: load the "
                    "PyTorch model, or leave the scope out, so that blocks go before groups"
                )
            return None
        if named != "auto" and named.partition(":")[0] != "loss":
            return None
        return self._tried(_RISES if named == "auto" else named)

    def in_loss(self, score: Scorer) -> Remembered:
        """Scores of groups as changes of the loss."""
        assert self.batches is not None
        if id(score) not in self._in_loss:
            loss = self.subject.loss
            metric = None if loss is None else LossMetric(loss, nonnegative=False)
            self._in_loss[id(score)] = Remembered(InLoss(score, self.batches, metric=metric))
        return self._in_loss[id(score)]

    @cached_property
    def batches(self) -> list[Any] | None:
        """The first few."""
        return None if self.subject.batches is None else list(islice(self.subject.batches, _FEW))

    def _tried(self, name: str) -> Depth | None:
        """The method of that name; None, and a note, where one that nobody asked for can't be had."""
        named = self.ways.depth
        try:
            found = self._asked_once(depth_named(name, self.batches, self.subject.loss, self.ways.seed))
            return found if named != "auto" or is_search(found) else self._leaving(dict(found))  # type: ignore[arg-type]
        except (ScoreError, DataError) as error:
            if named != "auto":
                raise
            self.notes.append(f"blocks weren't left out: {error}")
            return None

    def _usual(self) -> str:
        of = "blocks" if self.graph.blocks else "branches"
        if self.batches is None:
            return f"magnitude:{of}"
        enough = len(self.graph.blocks) >= _SLEB_NEEDS
        return "sleb" if enough and all(self._can_leave(block.name) for block in self.graph.blocks) else f"loss:{of}"

    def _leaving(self, scores: dict[str, float]) -> dict[str, float]:
        """Those that can leave the module: a graph in its place has no `generate`, nor other sizes of inputs."""
        found = {name: score for name, score in scores.items() if self._can_leave(name)}
        if not found:
            raise ScoreError(f"nothing can leave {self.graph.name} as a module")
        return found

    @property
    def _is_module(self) -> bool:
        return isinstance(self.graph.model, nn.Module)

    def _can_leave(self, name: str) -> bool:
        if not self._is_module:
            return True
        try:
            shortening_of(self.graph, [name])
        except (CutError, PlanError):
            return False
        return True

    def _asked_once(self, depth: Depth) -> Depth:
        if not is_search(depth):
            return checked_depth(self.graph, depth)
        found = RememberedSearch(depth)  # type: ignore[arg-type]
        found(self.graph, 1)
        return found


__all__ = ["Leaving"]
