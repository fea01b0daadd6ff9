"""What a story is made of: plain data on one pruning, from its costs to how it was made, as JSON and back.

A part that nothing is known of is empty or None, and the page leaves it out. Shares lie between 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from depgraph.cutting.report import Check
from depgraph.errors import CheckpointError
from depgraph.plain import plain, rebuilt
from depgraph.widths import Cost

FORMAT = 1


@dataclass(frozen=True)
class LayerWidths:
    """A layer's widths (before, after) on the side of its outputs and of its inputs; None where it has no such side.

    `out_family` and `into_family` are the families (an index of `Story.families`) of the axis that reaches the side, None for none.
    `gone` says that the layer was left out whole.
    """

    name: str
    block: str
    op: str
    params: tuple[int, int]
    out: tuple[int, int] | None = None
    into: tuple[int, int] | None = None
    out_family: int | None = None
    into_family: int | None = None
    gone: bool = False


@dataclass(frozen=True)
class AxisCut:
    """What one axis lost: `map` has the share of groups gone in each of up to 64 stretches of it, in their order.

    `scores` are its groups' scores in ascending order at up to 64 places, as evenly spread as can be, `gone` the share removed
    around each; both are empty without scores.
    """

    name: str
    what: str
    block: str
    family: int
    groups: int
    removed: int
    fixed: int
    map: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    gone: tuple[float, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A block or a branch that could be left out, and whether it was."""

    name: str
    kind: str
    params: int
    macs: int
    gone: bool


@dataclass(frozen=True)
class Curve:
    """How a figure changes when one axis alone loses the least of its groups: `changes` at `shares` of them gone."""

    axis: str
    shares: tuple[float, ...]
    changes: tuple[float | None, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The loss of the whole model (mean over `batches` batches), and a curve for every axis that was tried.

    `figure` says what stands for a loss, of a model that has none.
    """

    loss: float
    batches: int
    curves: tuple[Curve, ...] = ()
    figure: str = "loss"


@dataclass(frozen=True)
class Quality:
    """A figure of quality before and after, such as a perplexity, and what it was measured on."""

    name: str
    before: float | None
    after: float | None
    higher_is_better: bool = False
    data: str = ""


@dataclass(frozen=True)
class Trial:
    """One point of a trade-off: what made it, the share of the metric that is left, its quality, is it on the front?"""

    name: str
    share: float
    quality: float
    on_front: bool = False


@dataclass(frozen=True)
class TradeOff:
    """Cost against quality. `metric` is what `share`s are of; `dense` the unpruned model's quality; `chosen` an index."""

    metric: str
    quality: str
    trials: tuple[Trial, ...]
    higher_is_better: bool = False
    dense: float | None = None
    chosen: int | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a run, dense and pruned: `kind` is "predicted" or "measured", `what` the file or the operation.

    `ratio` is how many times faster the pruned one is, where that was measured better than by dividing these.
    """

    what: str
    kind: str
    dense_ms: float | None
    pruned_ms: float | None
    threads: int = 1
    ratio: float | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster the pruned one is, None where one is missing."""
        if self.ratio is not None:
            return self.ratio
        return self.dense_ms / self.pruned_ms if self.dense_ms and self.pruned_ms else None


@dataclass(frozen=True)
class MadeFile:
    """A file that was written: its name, what it is, its bytes, those of its dense counterpart if there is one."""

    name: str
    what: str
    bytes: int
    dense_bytes: int | None = None


@dataclass(frozen=True)
class Stage:
    """One of several steps: the shares that it was to keep, by metric, those that are left, the error of its check."""

    number: int
    keep: dict[str, float]
    left: dict[str, float]
    error: float | None = None


@dataclass(frozen=True)
class Making:
    """How it was made, and all that it takes to make it again: the command, the recipe, its settings, seeds and versions."""

    command: str = ""
    recipe: str = ""
    target: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    made: str = ""


@dataclass(frozen=True)
class Story:
    """All that a report tells of one pruning; see `depgraph.story.tell`, and `depgraph.story.story_page` for the page."""

    model: str
    before: Cost
    after: Cost
    form: str = ""
    families: tuple[str, ...] = ()
    layers: tuple[LayerWidths, ...] = ()
    axes: tuple[AxisCut, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    check: Check | None = None
    quality: tuple[Quality, ...] = ()
    sensitivity: Sensitivity | None = None
    tradeoff: TradeOff | None = None
    timings: tuple[Timing, ...] = ()
    files: tuple[MadeFile, ...] = ()
    steps: tuple[Stage, ...] = ()
    making: Making = Making()
    notes: tuple[str, ...] = ()

    def with_(self, **parts: Any) -> Story:
        """The same story with some parts replaced, such as `timings` that were measured later."""
        return replace(self, **parts)

    def to_json(self) -> dict[str, Any]:
        """The story as plain data; numbers that aren't finite become None."""
        return {"format": FORMAT, **plain(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Story:
        """A story from plain data; raises CheckpointError where it is none or of another format."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise CheckpointError(f"this is not a report of format {FORMAT}: make it again with this version")
        try:
            return rebuilt(cls, {name: value for name, value in data.items() if name != "format"})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is not a report: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Story:
        """Read a story from a JSON file; raises CheckpointError when it can't be read or is none."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(f"the report {path} can't be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not a report: {error}") from error
