"""One way through a search, as far as it came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from depgraph.cutting.report import CutReport
from depgraph.plan import Plan
from exporters.building.asked import BOTH
from exporters.building.pruning import Way
from importance.stepping import Step


@dataclass(frozen=True)
class Candidate:
    """One way through, as far as it came: `file` is what was measured, `why` says what stands against it, empty for nothing.

    times: milliseconds of the dense float32 file and of this one, in turns. predicted: their ratio by the latency model.
    beside: bytes that files which generate are taken to have more. quality: of the file; where that couldn't be run in the model's
    place, of the float32 model, and `of_file` is false.
    report: None where the dense model keeps within the budget; plan: None there too, and where steps don't tell which groups went.
    """

    way: Way
    precision: str
    model: nn.Module
    plan: Plan | None
    report: CutReport | None
    file: Path
    bytes: int
    times: tuple[float, float]
    predicted: float | None
    quality: float
    rounds: int
    of_file: bool = True
    beside: int = 0
    steps: tuple[Step, ...] = ()
    why: str = ""

    @property
    def recipe(self) -> str:
        """What made it, in a word or three."""
        if self.report is None:
            return "dense"
        return "depth" if self.only_blocks and self.way.depth != BOTH else str(self.way)

    @property
    def only_blocks(self) -> bool:
        """Did blocks go, and no groups?"""
        return self.plan is not None and bool(self.plan.branches) and not self.plan.removal

    @property
    def ratio(self) -> float:
        """The share of the dense float32 file's time that it takes."""
        return self.times[1] / self.times[0]


def is_done(way: Way, made: list[Candidate]) -> bool:
    """Is there nothing left to do for a way: the dense model keeps within the budget, or blocks alone were enough before?"""
    if made and made[-1].report is None:
        return True
    return way.depth == 1 and any(one.only_blocks and one.way.depth != BOTH for one in made)
