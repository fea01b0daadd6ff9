"""Allocations by name, for the command line and for configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from depgraph.errors import ScoreError
from importance.allocations.adapt import AdaptPruner
from importance.allocations.allocated import Allocation
from importance.allocations.cfsp import Cfsp
from importance.allocations.lamp import Lamp
from importance.allocations.owl import Owl
from importance.allocations.sap import Sap
from importance.allocations.spread import ByCost, Global, PerKind, Uniform
from importance.allocations.standardised import STRUCTURES, Standardised
from importance.choices import pick


@dataclass(frozen=True)
class Entry:
    """An allocation's class and the options that its name stands for."""

    make: Callable[..., Allocation]
    preset: dict[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> list[str]:
        return list(inspect.signature(self.make).parameters)

    @property
    def needs(self) -> list[str]:
        given = inspect.signature(self.make).parameters.values()
        return [p.name for p in given if p.default is inspect.Parameter.empty and p.name not in self.preset]


ALLOCATIONS: dict[str, Entry] = {
    "uniform": Entry(Uniform),
    "global": Entry(Global),
    "cost": Entry(ByCost),
    "kind": Entry(PerKind),
    "kind-uniform": Entry(PerKind, {"within": Uniform()}),
    "lamp": Entry(Lamp),
    "owl": Entry(Owl),
    "cfsp": Entry(Cfsp),
    "adapt-pruner": Entry(AdaptPruner),
    "sap": Entry(Sap),
    "surgeon": Entry(Global),
    **{name.lower(): Entry(Standardised, {"structure": name}) for name in STRUCTURES},
}


def names() -> list[str]:
    """The names of all allocations."""
    return list(ALLOCATIONS)


def needs(name: str) -> list[str]:
    """What the allocation of that name must be given, such as ["importances"]; raises ScoreError for an unknown name."""
    return pick(ALLOCATIONS, name, "allocation").needs


def named(name: str, **options: Any) -> Allocation:
    """The allocation of that name: `named("owl", spread=0.1)`.

    Raises ScoreError for an unknown name (with the nearest ones), an unknown option, or a missing one.
    """
    entry = pick(ALLOCATIONS, name, "allocation")
    for option in options:
        if option not in entry.takes:
            takes = ", ".join(sorted(entry.takes)) or "none"
            raise ScoreError(f"allocation {name!r} has no option {option!r}: it takes {takes}")
    missing = [option for option in entry.needs if option not in options]
    if missing:
        raise ScoreError(
            f"allocation {name!r} needs {missing[0]} (by block or axis): give them in Python, "
            f"importance.allocations.named({name!r}, {missing[0]}={{...}})"
        )
    return entry.make(**(entry.preset | options))
