"""Bringing the scores of different axes to one scale: each part maps the scores of one axis [groups] to [groups].

The formulas are those of Torch-Pruning's normalisers (METHODS.md 2.4); where a divisor is zero, the scores are left as
they are (and what was subtracted stays subtracted), so that the result is always finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from depgraph.errors import ScoreError
from importance.choices import pick

Part = Callable[[np.ndarray], np.ndarray]
NormalisationSpec: TypeAlias = "str | Part | Normalisation | tuple[str | Part, ...] | list[str | Part]"

_ROUNDING = 1e-12


def _divided(scores: np.ndarray, by: float) -> np.ndarray:
    return scores / by if by else scores


def _spread(scores: np.ndarray, spread: float) -> float:
    """`spread`, or zero where it is nothing but rounding: else scores that are all equal would be blown up to noise."""
    return spread if spread > _ROUNDING * np.abs(scores).max() else 0.0


def none(scores: np.ndarray) -> np.ndarray:
    """The scores as they are."""
    return scores


def by_mean(scores: np.ndarray) -> np.ndarray:
    """Divided by their mean."""
    return _divided(scores, float(scores.mean()))


def by_sum(scores: np.ndarray) -> np.ndarray:
    """Divided by their sum."""
    return _divided(scores, float(scores.sum()))


def by_max(scores: np.ndarray) -> np.ndarray:
    """Divided by their maximum."""
    return _divided(scores, float(scores.max()))


def gaussian(scores: np.ndarray) -> np.ndarray:
    """The z-score: mean 0 and (unbiased) standard deviation 1; zeros where all scores are equal."""
    if scores.size < 2:
        return np.zeros_like(scores)
    deviation = _spread(scores, float(scores.std(ddof=1)))
    return (scores - scores.mean()) / deviation if deviation else np.zeros_like(scores)


def min_max(scores: np.ndarray) -> np.ndarray:
    """From 0 for the lowest to 1 for the highest; zeros where all scores are equal."""
    width = _spread(scores, float(scores.max() - scores.min()))
    return (scores - scores.min()) / width if width else np.zeros_like(scores)


def lamp(scores: np.ndarray) -> np.ndarray:
    """Each over the sum of itself and all that are larger (LAMP): the largest gets 1, and equal ones the same.

    Meant for squared magnitudes: a threshold over all axes then never empties one. Raises ScoreError for negative scores.
    """
    if (scores < 0).any():
        raise ScoreError("LAMP needs scores of at least zero, such as squared magnitudes: take another normalisation")
    ascending = np.sort(scores)
    from_here = np.append(np.cumsum(ascending[::-1])[::-1], 0.0)
    larger = from_here[np.searchsorted(ascending, scores * (1 + _ROUNDING), side="right")]
    return np.divide(scores, scores + larger, out=np.zeros_like(scores), where=scores > 0)


PARTS: dict[str, Part] = {
    "none": none,
    "mean": by_mean,
    "sum": by_sum,
    "max": by_max,
    "gaussian": gaussian,
    "min-max": min_max,
    "lamp": lamp,
}


@dataclass(frozen=True)
class Normalisation:
    """Parts applied one after the other to the scores of each axis."""

    parts: tuple[Part, ...] = ()

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        for part in self.parts:
            scores = part(scores) if scores.size else scores
        return scores

    @classmethod
    def of(cls, spec: NormalisationSpec) -> Normalisation:
        """From a name of `PARTS`, a function [groups] -> [groups], or a tuple of these; raises ScoreError."""
        if isinstance(spec, Normalisation):
            return spec
        parts = tuple(spec) if isinstance(spec, tuple | list) else (spec,)
        return cls(tuple(part if callable(part) else pick(PARTS, part, "normalisation") for part in parts))
