"""Pruning on the way to a budget: by a recipe or a score, along widths, by leaving blocks out, or by both in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

import depgraph
from depgraph.cutting.report import CutReport
from depgraph.cutting.shortening import shortening_of
from depgraph.dependency import DependencyGraph
from depgraph.errors import CutError, DataError, NothingToPrune, PlanError, ScoreError, TargetError
from depgraph.options import Options
from depgraph.plan import Plan
from depgraph.scoring import Depth, Scores, checked_depth, is_search
from exporters.building.asked import Subject, Ways
from importance import named, recipes
from importance.depth import depth_named
from importance.recipe import Recipe
from importance.remembered import Remembered, RememberedSearch, remembering

_FEW, _SLEB_NEEDS = 8, 4  # batches to choose blocks by; blocks, as the first and the last one stay there


@dataclass(frozen=True)
class Way:
    """A recipe or a score by name, and how much of what is to go are blocks: 0 none, 1 all of it."""

    name: str
    depth: float = 0.0

    def __str__(self) -> str:
        return self.name if not self.depth else "depth" if self.depth == 1 else f"{self.name} after depth"


@dataclass
class Pruner:
    """Prunes the graph's model in several ways, each of which scores it once however often it is asked."""

    graph: DependencyGraph
    subject: Subject
    ways: Ways
    notes: list[str]
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _scorers: dict[str, Remembered] = field(default_factory=dict)

    def all(self) -> list[Way]:
        """All ways: those that leave blocks out come last, and only where some can go; raises NothingToPrune for none."""
        shares = sorted({share for share in self.ways.depth_shares if not share or self.depth is not None})
        found = [Way(name, share) for share in shares if share < 1 for name in self.ways.recipes]
        found += [Way(self.ways.recipes[0], 1.0) for share in shares if share == 1]
        if not found:
            raise NothingToPrune(
                f"{self.graph.name} has no blocks that could be left out, and nothing else was asked for"
            )
        return found

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
        batches = None if self.subject.batches is None else list(islice(self.subject.batches, _FEW))
        name = self._usual(data=batches is not None) if named == "auto" else named
        try:
            found = self._asked_once(depth_named(name, batches, self.subject.loss, self.ways.seed))
            return found if named != "auto" or is_search(found) else self._leaving(dict(found))  # type: ignore[arg-type, call-overload]
        except (ScoreError, DataError) as error:
            if named != "auto":
                raise
            self.notes.append(f"blocks weren't left out: {error}")
            return None

    def _usual(self, *, data: bool) -> str:
        of = "blocks" if self.graph.blocks else "branches"
        if not data:
            return f"magnitude:{of}"
        enough = len(self.graph.blocks) >= _SLEB_NEEDS
        return "sleb" if enough and all(self._can_leave(block.name) for block in self.graph.blocks) else f"loss:{of}"

    def _leaving(self, scores: dict[str, float]) -> dict[str, float]:
        """Those that can leave the module: a graph in its place has no `generate`, nor other sizes of inputs."""
        found = {name: score for name, score in scores.items() if self._can_leave(name)}
        if not found:
            raise ScoreError(f"nothing can leave {self.graph.name} as a module")
        return found

    def _can_leave(self, name: str) -> bool:
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

    def pruned(self, way: Way, target: depgraph.Target) -> tuple[Plan, CutReport]:
        """What a way makes of the model."""
        if way.depth == 1:
            assert self.depth is not None
            plan = self.graph.plan(self.depth, target, scope="depth")
            return plan, plan.apply_with_report(form=self.ways.options.get("form", "auto"))
        deep = {"depth": self.depth, "depth_share": way.depth} if way.depth else {}
        if way.name in recipes.RECIPES:
            return self._by_recipe(way.name, target, deep)
        plan = self.graph.plan(self._scorer(way.name), target, **self.ways.options, **deep)
        return plan, plan.apply_with_report(form=self.ways.options.get("form", "auto"))

    def _by_recipe(self, name: str, target: depgraph.Target, deep: Mapping[str, Any]) -> tuple[Plan, CutReport]:
        """What a recipe makes; it takes every axis where those that it is for aren't enough."""
        recipe = self._recipe(name)
        given = {k: v for k, v in self.ways.options.items() if v != getattr(Options(), k)}
        try:
            return recipe.reported(self.graph, target, **given, **deep)
        except (NothingToPrune, TargetError) as error:
            if "only" in given:
                raise
            said = f"{name} takes axes of all kinds, as those that it is for aren't enough"
            self.notes += [] if any(note.startswith(said) for note in self.notes) else [f"{said}: {error}"]
            return replace(recipe, units="all").reported(self.graph, target, **given, **deep)

    def _recipe(self, name: str) -> Recipe:
        if name not in self._recipes:
            made = recipes.named(name, self.subject.batches, self.subject.loss, self.ways.seed)
            self._recipes[name] = remembering(made)
        return self._recipes[name]

    def _scorer(self, name: str) -> Remembered:
        if name not in self._scorers:
            subject = self.subject
            made = named(name, batches=subject.batches, loss=subject.loss, seed=self.ways.seed)
            self._scorers[name] = Remembered(made)
        return self._scorers[name]

    def scores_of(self, way: Way, plan: Plan | None) -> Scores | None:
        """The scores that a plan was made by; of several that a recipe tried, those that explain it best."""
        if plan is None or way.depth == 1:
            return None
        if way.name not in self._recipes:
            return self._scorer(way.name)(self.graph)
        recipe = self._recipes[way.name]
        tried = [one.score for one in getattr(recipe, "rivals", (recipe,)) if isinstance(one.score, Remembered)]
        said = [score(self.graph) for score in tried if plan.graph is self.graph]
        surprises: Callable[[Scores], int] = lambda scores: _surprises(scores, plan)  # noqa: E731
        return min(said, key=surprises, default=None)


def _surprises(scores: Scores, plan: Plan) -> int:
    """How many groups went though others of their axis, which could go too, score lower and stay."""
    count = 0
    for name, gone in plan.removal.items():
        values = np.asarray(scores[name])
        stays = np.setdiff1d(np.flatnonzero(plan.graph[name].prunable), gone)
        count += int((values[list(gone)] > values[stays].min()).sum()) if len(stays) else 0
    return count


__all__ = ["Pruner", "Way"]
