"""From per-index scores of an axis's members to one score per group (METHODS.md 2.1 and 2.4).

First within a member, over the indices that go with one group (the rows of a head); then over the members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from depgraph.errors import ScoreError
from importance.choices import pick
from importance.normalisation import Normalisation, NormalisationSpec

Over = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps a table of scores [members, groups], and which of its entries exist (bool, same shape), to scores [groups].

An entry doesn't exist where the member has no index in the group; it holds 0 then."""

ReductionSpec: TypeAlias = "str | Over | Reduction"

Scored = tuple[np.ndarray, np.ndarray]
"""The labels of one member's dim (group number per index, -1 for none) and its scores, both [indices]."""


def over_sum(table: np.ndarray, present: np.ndarray) -> np.ndarray:
    return table.sum(axis=0)


def over_mean(table: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The mean over those members that the group has indices in."""
    return table.sum(axis=0) / np.maximum(present.sum(axis=0), 1)


def over_max(table: np.ndarray, present: np.ndarray) -> np.ndarray:
    return np.where(present, table, -np.inf).max(axis=0)


def over_prod(table: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The product; raises ScoreError where it leaves the range of float64."""
    factors = np.where(present, table, 1.0)
    with np.errstate(over="ignore", under="ignore"):
        product = factors.prod(axis=0)
    vanished = (product == 0) & (factors != 0).all(axis=0)
    if vanished.any() or not np.isfinite(product).all():
        raise ScoreError(
            f"the product of the scores of {len(table)} members is too large or too small for float64: "
            "use reduction='geomean', which ranks alike"
        )
    return product


def over_geomean(table: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The geometric mean over those members that the group has indices in; raises ScoreError for negative scores."""
    if (table < 0).any():
        raise ScoreError("the geometric mean needs scores of at least zero: normalise after the reduction, not before")
    with np.errstate(divide="ignore"):
        logs = np.log(np.where(present, table, 1.0))
    return np.exp(logs.sum(axis=0) / np.maximum(present.sum(axis=0), 1))


def over_first(table: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The score of the first member, in the order of the axis, that the group has indices in."""
    return np.take_along_axis(table, present.argmax(axis=0)[None], axis=0)[0]


def over_last(table: np.ndarray, present: np.ndarray) -> np.ndarray:
    return over_first(table[::-1], present[::-1])


OVER: dict[str, Over] = {
    "sum": over_sum,
    "mean": over_mean,
    "max": over_max,
    "prod": over_prod,
    "geomean": over_geomean,
    "first": over_first,
    "last": over_last,
}


def _within_sum(labels: np.ndarray, scores: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(labels, weights=scores, minlength=size)


def _within_mean(labels: np.ndarray, scores: np.ndarray, size: int) -> np.ndarray:
    return _within_sum(labels, scores, size) / np.maximum(np.bincount(labels, minlength=size), 1)


def _within_max(labels: np.ndarray, scores: np.ndarray, size: int) -> np.ndarray:
    found = np.full(size, -np.inf)
    np.maximum.at(found, labels, scores)
    return np.where(np.isfinite(found), found, 0.0)


WITHIN = {"sum": _within_sum, "mean": _within_mean, "max": _within_max}


@dataclass(frozen=True)
class Reduction:
    """How the scores of members become the score of a group.

    `over` is a name of `OVER` or a function of its kind; `within` ("sum", "mean", "max") joins the indices that one
    member has in one group; `each` normalises the group scores of every member by themselves before they are joined.
    """

    over: str | Over = "sum"
    within: str = "sum"
    each: NormalisationSpec = "none"
    _over: Over = field(init=False, repr=False, compare=False)
    _each: Normalisation = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pick(WITHIN, self.within, "reduction within a member")
        object.__setattr__(self, "_over", self.over if callable(self.over) else pick(OVER, self.over, "reduction"))
        object.__setattr__(self, "_each", Normalisation.of(self.each))

    @classmethod
    def of(cls, spec: ReductionSpec) -> Reduction:
        """From a name of `OVER`, a function of its kind, or as it is; raises ScoreError for an unknown name."""
        return spec if isinstance(spec, Reduction) else cls(spec)

    def __call__(self, members: Sequence[Scored], size: int) -> np.ndarray:
        """The scores [size] of an axis's groups; 0 for a group in which no member has an index."""
        if not members:
            return np.zeros(size)
        table = np.zeros((len(members), size))
        present = np.zeros((len(members), size), dtype=bool)
        for row, (labels, scores) in enumerate(members):
            reached = labels >= 0
            present[row, labels[reached]] = True
            joined = WITHIN[self.within](labels[reached], scores[reached], size)
            table[row, present[row]] = self._each(joined[present[row]])
        found = np.asarray(self._over(table, present))
        if found.shape != (size,):
            raise ScoreError(
                f"the reduction {self.over!r} gave shape {found.shape} for {size} groups: one number for each"
            )
        return np.where(present.any(axis=0), found, 0.0)
