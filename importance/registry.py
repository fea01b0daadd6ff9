"""Estimators by name, for the command line and for configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from depgraph.errors import ScoreError
from depgraph.scoring import Scorer
from importance.activation import CRITERIA, Activation
from importance.bonsai import Bonsai
from importance.choices import pick
from importance.column_magnitude import ColumnMagnitude
from importance.expert_outputs import ExpertOutputs
from importance.experts import ExpertClusters
from importance.fisher import Fisher
from importance.fisher_brain import FisherBrain
from importance.fpgm import FilterDistance
from importance.gblm import GradientBlend
from importance.losses import GIVE
from importance.magnitude import Magnitude
from importance.normalisation import NormalisationSpec
from importance.obs import OptimalBrain
from importance.randomly import Random
from importance.reduction import ReductionSpec
from importance.scales import NormScale
from importance.surgeon import Surgeon
from importance.taylor import Taylor

SHARED = frozenset({"batches", "loss", "seed", "progress"})
"""Options a caller may offer to any estimator; those that don't take one do without it."""


@dataclass(frozen=True)
class Entry:
    """An estimator's class and the options that its name stands for."""

    make: Callable[..., Scorer]
    preset: dict[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> set[str]:
        return set(inspect.signature(self.make).parameters)


def _activation(
    batches: Iterable[Any], criterion: str, reduction: ReductionSpec = "sum", normalise: NormalisationSpec = "none"
) -> Scorer:
    return Activation(batches, criterion, reduction, normalise)


def _obs(
    batches: Iterable[Any], damping: float = 0.01, rounds: int = 1, normalise: NormalisationSpec = "none"
) -> Scorer:
    return OptimalBrain(batches, damping, rounds, normalise)


SCORERS: dict[str, Entry] = {
    "random": Entry(Random),
    "magnitude": Entry(Magnitude),
    "magnitude-l1": Entry(Magnitude, {"p": 1.0}),
    "lamp": Entry(Magnitude, {"normalise": "lamp"}),
    "mag-sp": Entry(ColumnMagnitude),
    "fpgm": Entry(FilterDistance),
    "bn-scale": Entry(NormScale),
    "taylor": Entry(Taylor),
    "taylor-vector": Entry(Taylor, {"form": "vector"}),
    "taylor-second": Entry(Fisher),
    "taylor-mix": Entry(Fisher, {"form": "mix"}),
    "obd": Entry(Fisher, {"reduction": "mean"}),
    "gblm": Entry(GradientBlend),
    "llm-surgeon": Entry(Surgeon),
    "bonsai": Entry(Bonsai),
    "stun": Entry(ExpertClusters),
    "minitron-experts": Entry(ExpertOutputs),
    "obs": Entry(_obs),
    "fisher-obs": Entry(FisherBrain),
}
SCORERS |= {name: Entry(_activation, {"criterion": name}) for name in CRITERIA if name not in SCORERS}


def names() -> list[str]:
    """The names of all estimators."""
    return list(SCORERS)


def needs_data(name: str) -> bool:
    """Whether the estimator of that name needs `batches`; raises ScoreError for an unknown name."""
    return "batches" in pick(SCORERS, name, "score").takes


def needs_gradients(name: str) -> bool:
    """Whether the estimator of that name takes a backward pass; raises ScoreError for an unknown name."""
    return getattr(pick(SCORERS, name, "score").make, "gradients", False)


def named(name: str, **options: Any) -> Scorer:
    """The estimator of that name: `named("taylor", batches=...)`.

    The options batches, loss, seed and progress may be given to any name. Raises ScoreError for an unknown name (with
    the nearest ones), an unknown option, or missing batches.
    """
    entry = pick(SCORERS, name, "score")
    unknown = sorted(set(options) - entry.takes - SHARED)
    if unknown:
        raise ScoreError(f"score {name!r} has no option {unknown[0]!r}: it takes {', '.join(sorted(entry.takes))}")
    if "batches" in entry.takes and options.get("batches") is None:
        raise ScoreError(f"score {name!r} needs calibration data: {GIVE}")
    taken = {option: value for option, value in options.items() if option in entry.takes}
    return entry.make(**(entry.preset | taken))
