"""Pruning on the way to a budget: by a recipe or a score, along widths, by leaving blocks out, or by both in turn or at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

import depgraph
from depgraph.cutting.report import CutReport
from depgraph.dependency import DependencyGraph
from depgraph.errors import NothingToPrune, TargetError
from depgraph.options import Options
from depgraph.plan import Plan
from depgraph.scoring import Scores
from exporters.building.asked import BOTH, Share, Subject, Ways
from exporters.building.leaving import Leaving
from exporters.building.sources import Source, source_of
from importance import recipes
from importance.recipe import Recipe
from importance.remembered import Remembered, remembering
from importance.rivals import Rivals
from importance.stepping import Step

_BETWEEN = 0.75  # where ways that let blocks compete are tried: after those that leave out half, before blocks alone
IN_STEPS = "in steps"


@dataclass(frozen=True)
class Way:
    """A recipe or a score by name, and how much of what is to go are blocks: 0 none, 1 all of it, `BOTH` as they compete."""

    name: str
    depth: Share = 0.0

    def __str__(self) -> str:
        said = {0: self.name, 1: "depth", BOTH: f"{self.name} and depth"}
        return said.get(self.depth, f"{self.name} after depth")


@dataclass(frozen=True)
class Done:
    """What a way made: the report of its cut, what was taken away, None where steps don't tell, and the steps, if it went in some."""

    report: CutReport
    plan: Plan | None
    steps: tuple[Step, ...] = ()


@dataclass
class Pruner:
    """Prunes the graph's model in several ways, each of which scores it once however often it is asked."""

    graph: DependencyGraph
    subject: Subject
    ways: Ways
    notes: list[str]
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _scorers: dict[str, Remembered] = field(default_factory=dict)

    @cached_property
    def _from(self) -> Source:
        return source_of(self.subject, self.ways)

    @cached_property
    def leaving(self) -> Leaving:
        """What says which blocks go."""
        return Leaving(self.graph, self.subject, self.ways, self.notes)

    def all(self) -> list[Way]:
        """All ways: those that leave blocks out come last, and only where some can go; raises NothingToPrune for none."""
        order: Callable[[Share], float] = lambda share: _BETWEEN if share == BOTH else float(share)  # noqa: E731
        found = [way for share in sorted(set(self.ways.depth_shares), key=order) for way in self._ways(share)]
        if not found:
            raise NothingToPrune(
                f"{self.graph.name} has no blocks that could be left out, and nothing else was asked for"
                + "".join(f"; {note}" for note in self.notes)
            )
        return found

    def _ways(self, share: Share) -> Iterator[Way]:
        """The ways that leave so much to blocks."""
        if share and self.leaving.depth is None or share == BOTH and self.leaving.rises is None:
            return
        for name in self.ways.recipes if share != 1 else self.ways.recipes[:1]:
            why = self._alone(name, share)
            if not why:
                yield Way(name, share)
            elif self.ways.depth_shares == (share,):
                self.notes.append(why)

    def _alone(self, name: str, share: Share) -> str:
        """Why a recipe goes without blocks, or what leaves out some of these; empty where it doesn't."""
        if share in (0, 1) or name not in recipes.RECIPES:
            return ""
        recipe = self._recipe(name)
        if recipe.schedule is not None:
            return f"{name} goes in steps, which take groups only"
        if share == BOTH and self._competing(recipe) is None:
            return f"scores of {name} can't compete with blocks"
        return ""

    def pruned(self, way: Way, target: depgraph.Target) -> Done:
        """What a way makes of the model."""
        if way.depth == 1:
            return self._cut(self.graph.plan(self.leaving.depth, target, scope="depth"))  # type: ignore[arg-type]
        deep: dict[str, Any] = {}
        if way.depth:
            first = {"depth": self.leaving.depth, "depth_share": way.depth}
            deep = {"depth": self.leaving.rises, "scope": BOTH} if way.depth == BOTH else first
        if way.name in recipes.RECIPES:
            return self._by_recipe(way, target, deep)
        score: Any = self._scorer(way.name)
        score = self.leaving.in_loss(score) if way.depth == BOTH else score
        return self._cut(self.graph.plan(score, target, **{**self.ways.options, **deep}))

    def _cut(self, plan: Plan) -> Done:
        return Done(plan.apply_with_report(form=self.ways.options.get("form", "auto")), plan)

    def _by_recipe(self, way: Way, target: depgraph.Target, deep: Mapping[str, Any]) -> Done:
        """What a recipe makes; it takes every axis where those that it is for aren't enough."""
        recipe = self._recipe(way.name)
        if way.depth == BOTH:
            recipe = self._competing(recipe) or recipe
        given = {k: v for k, v in self.ways.options.items() if v != getattr(Options(), k)}
        given |= deep
        try:
            return _carried_out(recipe, self.graph, target, given)
        except (NothingToPrune, TargetError) as error:
            if "only" in given:
                raise
            said = f"{way.name} takes axes of all kinds, as those that it is for aren't enough"
            self.notes += [] if any(note.startswith(said) for note in self.notes) else [f"{said}: {error}"]
            return _carried_out(replace(recipe, units="all"), self.graph, target, given)

    def _competing(self, recipe: Recipe) -> Recipe | None:
        """The same with scores that are changes of the loss; None where it spreads its budget in a way of its own."""
        if isinstance(recipe, Rivals):
            rivals = [found for one in recipe.rivals if (found := self._competing(one)) is not None]
            return replace(recipe, rivals=tuple(rivals)) if rivals else None
        own = recipe.schedule or recipe.prepare or recipe.allocation
        if own is not None or recipe.score is None or recipe.propagation != "dense":
            return None
        return replace(recipe, score=self.leaving.in_loss(recipe.score)) if _compares(recipe.score) else None

    def _recipe(self, name: str) -> Recipe:
        if name not in self._recipes:
            self._recipes[name] = remembering(self._from.recipe(name))
        return self._recipes[name]

    def _scorer(self, name: str) -> Remembered:
        if name not in self._scorers:
            self._scorers[name] = Remembered(self._from.scorer(name))
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


def _carried_out(recipe: Recipe, graph: DependencyGraph, target: depgraph.Target, options: Mapping[str, Any]) -> Done:
    """What a recipe makes of a graph, in one shot or in steps, of whose checks the worst is told."""
    done = recipe.prune(graph, target, **options)
    made = () if done.compensated is None else (str(done.compensated),)
    if done.report is not None:
        return Done(replace(done.report, notes=(*done.report.notes, *made)), done.plan)
    assert done.scheduled is not None
    steps = done.scheduled.steps
    check = max((s.check for s in steps if s.check is not None), key=lambda check: check.error, default=None)
    notes = dict.fromkeys(note for step in steps for note in step.notes)
    report = CutReport(done.model, IN_STEPS, graph.dense_cost, done.after, check, notes=(*notes, *made))
    return Done(report, done.plan, steps)


def _compares(score: Any) -> bool:
    return getattr(score, "comparable", True)


def _surprises(scores: Scores, plan: Plan) -> int:
    """How many groups went though others of their axis, which could go too, score lower and stay."""
    count = 0
    for name, gone in plan.removal.items():
        values = np.asarray(scores[name])
        stays = np.setdiff1d(np.flatnonzero(plan.graph[name].prunable), gone)
        count += int((values[list(gone)] > values[stays].min()).sum()) if len(stays) else 0
    return count


__all__ = ["Done", "Pruner", "Way"]
