"""Scores that are asked for once for each graph, for searches that plan the same model again and again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from depgraph import DependencyGraph
from depgraph.scoring import Scorer, Scores
from importance.recipe import Recipe
from importance.rivals import Rivals

_OWN = frozenset({"data", "needs"})  # by which a recipe would give a score new statistics each time


class Remembered:
    """An estimator that says of a graph again what it said first; in all else it is like `score`."""

    def __init__(self, score: Scorer) -> None:
        self._score = score
        self._said: WeakKeyDictionary[DependencyGraph, Any] = WeakKeyDictionary()

    def __call__(self, graph: DependencyGraph, /) -> Scores:
        if graph not in self._said:
            self._said[graph] = self._score(graph)
        found: Scores = self._said[graph]
        return found

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._score, name)


def remembering(recipe: Recipe) -> Recipe:
    """The recipe with scores that are worked out once for each graph; as it is, where these depend on more than the graph.

    That is where it prunes in steps, prepares a model, or scores what is pruned so far.
    """
    if isinstance(recipe, Rivals):
        return replace(recipe, rivals=tuple(remembering(one) for one in recipe.rivals))
    if recipe.score is None or recipe.schedule is not None or recipe.prepare is not None:
        return recipe
    if recipe.propagation == "sequential":
        return recipe
    return replace(recipe, score=Remembered(recipe.score))
