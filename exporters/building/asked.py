"""What a build is asked for: a model with all that is known of it, a budget, and the ways that are open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from depgraph.errors import TargetError
from depgraph.unmet import sized
from exporters.timing.profile import Profile
from importance.losses import Loss
from importance.sweeping import Figure

PRECISIONS = ("float32", "float16", "int8-dynamic", "int8-static", "int4")
BOTH: Literal["both"] = "both"
Share = float | Literal["both"]


@dataclass(frozen=True)
class Subject:
    """A model in eval mode with example inputs of the sizes that it will be run with, and what is known of it.

    model: a module; or the path of an ONNX file, or an onnx_ir.Model, with `kwargs` of arrays by input name or of open sizes (or
    nothing: inputs are made up), which `file_subject` makes a subject of.
    measure: a figure of quality of any model in its place, which `figure` names; of an onnx_ir.Model, where this is a file.
    batches: to score, compensate and calibrate with; `loss` of an output and a batch, None for the model's own.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    measure: Callable[[Any], float]
    figure: Figure
    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Budget:
    """Limits that all hold: milliseconds of one run on the example's sizes, bytes of each file that runs alone, with its weights.

    The file with a cache, of a model that generates, is such a file; an encoder and a decoder are one together. `latency_share` and
    `bytes_share` are the same as shares of the dense model's time and of its float32 file.
    `profile` is that of a device; without it this machine is measured, with `threads`. Raises TargetError for limits that
    are no positive numbers, for shares from 1, where a limit is given in both ways, and when none is given.
    """

    latency_ms: float | None = None
    bytes: int | None = None
    threads: int = 1
    profile: Profile | None = None
    latency_share: float | None = None
    bytes_share: float | None = None

    def __post_init__(self) -> None:
        most = {"latency_ms": math.inf, "bytes": math.inf, "latency_share": 1, "bytes_share": 1}
        given = {name: value for name in most if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if not 0 < value < most[name]:
                below = " below 1" if most[name] == 1 else ""
                raise TargetError(f"a budget of {name}={value!r} is none: give a positive number{below}")
        if len({name.partition("_")[0] for name in given}) < len(given):
            raise TargetError(
                f"a budget of {' and '.join(given)} limits one thing twice: give it as a number or as a share"
            )
        if not given:
            raise TargetError("a budget needs a limit: milliseconds of a run, bytes of the file, or both")

    @property
    def timed(self) -> bool:
        """Is time limited?"""
        return self.latency_ms is not None or self.latency_share is not None

    def of(self, dense_ms: float, dense_bytes: int) -> Budget:
        """The same without shares, of a model that takes so many milliseconds and bytes."""
        ms = self.latency_ms if self.latency_share is None else self.latency_share * dense_ms
        most = self.bytes if self.bytes_share is None else int(self.bytes_share * dense_bytes)
        return Budget(ms, most, self.threads, self.profile)

    @property
    def words(self) -> str:
        """The limits as a person says them, where they are no shares: "20 ms and 30 MB"."""
        ms = [] if self.latency_ms is None else [f"{self.latency_ms:.4g} ms"]
        return " and ".join([*ms, *([] if self.bytes is None else [sized(self.bytes)])])

    def __str__(self) -> str:
        said = [f"{self.latency_ms:.4g} ms"] if self.latency_ms is not None else []
        said += [f"{self.latency_share:.0%} of the time"] if self.latency_share is not None else []
        said += [f"{self.bytes:,} bytes"] if self.bytes is not None else []
        said += [f"{self.bytes_share:.0%} of the bytes"] if self.bytes_share is not None else []
        return ", ".join(said)


@dataclass(frozen=True)
class Ways:
    """What may be tried: recipes or scores by name, and precisions of the file, each with each.

    depth: the score or search by which blocks are left out (a name of `importance.depth.depth_names()`); "auto" takes one by
    the loss or, without data, by magnitude, where axes are neither protected nor named; "none" leaves all in. depth_shares: how
    much of what is to go may be blocks, each tried: 0 is widths alone, 1 blocks alone, between them blocks first; with "both" blocks
    and groups compete by what each costs in loss, which takes batches and scores that compare across axes.
    options: of `graph.plan`. rounds: how often a result that measures above the budget is made anew, smaller. shares: of the
    parameters, at which the trade-off of the report is measured. probes: how many axes its sensitivity curves are of.
    """

    recipes: tuple[str, ...] = ("best",)
    precisions: tuple[str, ...] = ("float32",)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    depth: str = "auto"
    depth_shares: tuple[Share, ...] = (0.0, 0.5, BOTH, 1.0)
    rounds: int = 3
    shares: tuple[float, ...] = (0.9, 0.7, 0.5)
    probes: int = 12
    opset: int = 20
