"""What a cut did and what was checked, as data that prints as a paragraph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from depgraph.widths import Cost
from depgraph.wording import counted


@dataclass(frozen=True)
class Check:
    """How the pruned model was compared with the zeroed original.

    `error` is the largest difference of any output and `sensitivity` the largest change that the removal itself made
    (where a vocabulary is trimmed, that other tokens make, as `moved_by` says), both as shares of the largest output.
    `exact_axes` were checked by zeroing, `mixed_axes` by comparing the cut model with the cut program. `calls` counts
    the torch calls whose shapes were compared with the prediction, where there are no values. `branches` were
    compared with the captured program without them. Axes that take whole modules along, `chosen` of them, were
    compared with the original in which these can't be chosen. Where rounding alone moved the output by more than is
    allowed, by `rounding`, all this was computed in double precision. The pruned model ran as it does for its user,
    unless the original itself computes something else then, apart by `captured`.
    """

    error: float
    sensitivity: float
    tolerance: float
    exact_axes: int
    mixed_axes: int
    calls: int = 0
    skipped: str = ""
    moved_by: str = "the removal"
    branches: int = 0
    chosen: int = 0
    rounding: float = 0.0
    captured: float = 0.0

    @property
    def vacuous(self) -> bool:
        """Did the removal move the output too little to prove anything?"""
        return not self.skipped and self.sensitivity < 10 * max(self.error, self.tolerance / 10)

    def __str__(self) -> str:
        if self.skipped:
            return f"not compared by value: {self.skipped}"
        removed = self.exact_axes or self.mixed_axes or self.branches or self.chosen or self.sensitivity
        if not removed:
            return f"nothing was removed: error {self.error:.1e} of the largest output"
        verdict = "VACUOUS (the removal hardly moves the output)" if self.vacuous else "equal"
        return (
            f"{verdict}: error {self.error:.1e} of the largest output, where {self.moved_by} moved it by {self.sensitivity:.1e} "
            f"({self._parts()})"
            + (f"; in double precision, as rounding alone moves it by {self.rounding:.1e}" if self.rounding else "")
            + (
                f"; as it was captured: when it simply runs the original differs from that by {self.captured:.1e}"
                if self.captured
                else ""
            )
        )

    def _parts(self) -> str:
        left = (
            f"{counted(self.branches, 'branch', 'branches')} against the program without {'it' if self.branches == 1 else 'them'}"
            if self.branches
            else ""
        )
        out = (
            f"{counted(self.chosen, 'axis', 'axes')} against the original that can't choose what goes"
            if self.chosen
            else ""
        )
        mixed = counted(self.mixed_axes, "mixed axis", "mixed axes")
        axes = f"{counted(self.exact_axes, 'axis', 'axes')} against zeros, {mixed} against the cut program"
        shown = self.exact_axes + self.mixed_axes or not (left or out)
        return ", ".join(part for part in (left, axes if shown else "", out) if part)


@dataclass(frozen=True)
class CutReport:
    """A finished cut: the model, its form ("module" or "graph"), costs before and after, and the check."""

    model: nn.Module = field(repr=False)
    form: str
    before: Cost
    after: Cost
    check: Check | None
    record: dict[str, Any] = field(repr=False, default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"cut as a {self.form}"]
        for name in ("params", "macs", "bytes"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            lines.append(f"{name}: {old:,} -> {new:,} ({new / max(old, 1):.1%})")
        lines.append(f"check: {self.check if self.check is not None else 'left out as asked'}")
        return "\n".join([*lines, *self.notes])
