"""How a plan is made: the options of `graph.plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from depgraph.axes import Axis
from depgraph.errors import PlanError
from depgraph.patterns import Pattern, Shares, listed, unnamed
from depgraph.rounding import BLOCKS

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


@dataclass(frozen=True)
class Options:
    """How the budget is spread.

    scope: "global" (one ranking of all groups), "axis" (the same share of every axis), "uniform" (the same number of
        groups in all axes of one kind, so that all layers keep equal widths; of a model of transformers only what some
        config expresses goes, see `depgraph.moves`, so that it can be saved as a plain directory), "depth" or "both" (see
        `depth`); "auto" is "axis" for a scorer whose attribute `comparable` is False, else "global".
    rank: "score", or "density" (score per cost, for scores that add up, such as Taylor's); "auto" asks the scorer. Of several
        limits each gives a ranking by density, and of their plans the one that loses the lowest scores is taken.
    round_to: keep a multiple of this many groups; axes that have fewer than that to begin with are cut freely, and noted, as are
        those that the code ties to others so that no multiple fits.
        Or the name of a rounding: "gguf" gives the rows of all matrices a multiple of 32, as GGUF's quantised formats want
        them, "gguf-k" of 256, as its K-quants do; axes too small for that stay whole.
    floor: the least share of every axis that stays (one group always does); or such shares by pattern, of which the largest
        that fits an axis counts, and 0 where none does.
    protect, only: axes to leave whole, and the only ones to touch: name patterns, axes or callables.
    form: "module" also leaves whole what the module's Python can't express; "auto" does where the other axes lose at most
        half as much again for that; "graph" doesn't.
    branches: blocks and branches that are left out whatever the scorer says; the target counts what they save.
    depth: scores of blocks or branches, or a search for them (see `importance.depth`). With it some are left out first, then
        groups are chosen as `scope` says; scope="both" lets branches and groups compete, by what each costs in loss;
        scope="depth" touches no groups (the scorer is that of depth then).
    depth_share: how much of what is to go goes with blocks and branches where depth comes first and the target doesn't say
        how many are left out: of 40% that go, half are 20%.
    """

    scope: str = "auto"
    rank: str = "auto"
    round_to: int | str = 1
    floor: float | Mapping[str, float] = 0.0
    protect: tuple[Pattern, ...] = ()
    only: tuple[Pattern, ...] = ()
    form: str = "auto"
    branches: tuple[str, ...] = ()
    depth: Any = None
    depth_share: float = 0.5

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options from keywords; raises PlanError for an unknown one or a value out of range."""
        known = {f.name for f in fields(cls)}
        for name in given:
            if name not in known:
                raise PlanError(f"plan has no option {name!r}; it takes {', '.join(sorted(known))}")
        patterns: dict[str, tuple[Any, ...]] = {n: listed(given[n]) for n in ("protect", "only") if n in given}
        if isinstance(given.get("branches", ()), str):
            raise PlanError(f"branches={given['branches']!r} is a single name: give a list of names")
        patterns |= {"branches": tuple(given.get("branches", ()))}
        options = cls(**{**given, **patterns})
        for name, allowed in {"scope": SCOPES, "rank": ("auto", "score", "density"), "form": FORMS}.items():
            if getattr(options, name) not in allowed:
                raise PlanError(f"plan option {name}={getattr(options, name)!r} is not one of {', '.join(allowed)}")
        whole = (
            isinstance(options.round_to, Integral) and not isinstance(options.round_to, bool) and options.round_to >= 1
        )
        if not whole and options.round_to not in tuple(BLOCKS):
            names = ", ".join(map(repr, BLOCKS))
            raise PlanError(
                f"plan option round_to={options.round_to!r} must be a whole number of groups, 1 or more, or {names}"
            )
        floors = options.floor if isinstance(options.floor, Mapping) else {"": options.floor}
        for pattern, share in floors.items():
            if not isinstance(share, Real) or not 0 <= share <= 1:
                of = f" of {pattern!r}" if pattern else ""
                raise PlanError(f"plan option floor={share!r}{of} must be a share between 0 and 1")
        if not isinstance(options.depth_share, Real) or not 0 < options.depth_share < 1:
            raise PlanError(f"plan option depth_share={options.depth_share!r} must be a share between 0 and 1")
        return options

    def floor_of(self, axis: Axis) -> float:
        """The least share of an axis that stays."""
        if not isinstance(self.floor, Mapping):
            return self.floor
        return max(self._floors.of(axis), default=0.0)

    @cached_property
    def _floors(self) -> Shares:
        return Shares(self.floor if isinstance(self.floor, Mapping) else {})

    @classmethod
    def changed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of options by name that aren't what they are by default."""
        usual = cls()
        return {name: value for name, value in given.items() if value != getattr(usual, name)}

    def check_patterns(self, graph: DependencyGraph) -> None:
        """Raise PlanError for a name or axis that is none of the graph's: it is a slip, and would protect nothing."""
        floors = tuple(self.floor) if isinstance(self.floor, Mapping) else ()
        given: dict[str, tuple[Pattern, ...]] = {"protect": self.protect, "only": self.only, "floor": floors}
        for option, patterns in given.items():
            for name in unnamed(graph, patterns):
                raise PlanError(f"{option}={name!r} names no axis and no parameter of one: graph.axes lists them")


SCOPES = ("auto", "global", "axis", "uniform", "depth", "both")
FORMS = ("auto", "module", "graph")
