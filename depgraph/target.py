"""The budget: which share of parameters, MACs or bytes is to be kept, how many bytes, how many milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from depgraph.errors import TargetError
from depgraph.latency import LatencyModel
from depgraph.widths import Cost

METRICS = ("params", "macs", "bytes")


@dataclass(frozen=True)
class Target:
    """What is to be kept; where several are given, all must hold.

    ``Target(params=0.7)`` keeps 70% of the parameters; `macs` counts the multiply-accumulates of the traced call, `bytes`
    parameters and buffers as stored. Each is a share strictly between 0 and 1; `bytes` may also be a whole number of bytes,
    2 or more: ``Target(bytes=30_000_000)`` is 30 MB. ``Target(latency_ms=20, latency=model)`` is 20 milliseconds by a latency
    model, see `depgraph.latency`. `left_out` is the number of blocks (or branches,
    whichever are ranked) to leave out. A limit that the dense model meets already takes nothing away.

    Raises TargetError for a value out of range, when none is given, and for milliseconds without a latency model.
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency_ms: float | None = None
    latency: LatencyModel | None = None
    left_out: float | None = None  # a whole number

    def __post_init__(self) -> None:
        if self.left_out is not None and (type(self.left_out) is not int or self.left_out < 1):
            raise TargetError(f"target left_out={self.left_out!r} is no number of blocks: give 1 or more, left_out=2")
        if (self.latency_ms is None) != (self.latency is None):
            raise TargetError(
                "latency_ms and latency go together: Target(latency_ms=20, latency=model), where model says how long a "
                "pruned model takes, such as exporters.MeasuredLatency.of(graph)"
            )
        if self.latency_ms is not None:
            _check_milliseconds(self.latency_ms)
            object.__setattr__(self, "latency_ms", float(self.latency_ms))
        given = [m for m in METRICS if getattr(self, m) is not None]
        if not given and self.latency is None and self.left_out is None:
            raise TargetError(
                "a target needs at least one of params, macs, bytes and latency_ms, such as Target(params=0.7)"
            )
        for name in given:
            if name == "bytes" and _is_count(self.bytes):
                continue
            _check_share(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def shares(self) -> dict[str, float]:
        """The shares that were given, by metric."""
        return {
            m: float(value)
            for m in METRICS
            if (value := getattr(self, m)) is not None and not (m == "bytes" and _is_count(value))
        }

    @property
    def most_bytes(self) -> int | None:
        """The bytes that were given as a whole number."""
        return int(self.bytes) if self.bytes is not None and _is_count(self.bytes) else None

    def in_shares(self, dense: Cost) -> Target:
        """The same in shares of a dense cost, for what prunes in steps; raises TargetError for milliseconds."""
        if self.latency is not None:
            raise TargetError(
                "milliseconds are met in one shot: in steps, or on a model that was changed first, each plan is of another "
                "graph than the latency model's; give shares there, or plan at once"
            )
        return self.with_byte_share(dense)

    def with_byte_share(self, dense: Cost) -> Target:
        """The same with the number of bytes, where one was given, as a share of a dense cost; milliseconds stay what they are."""
        if self.most_bytes is None:
            return self
        return replace(self, bytes=min(self.most_bytes / max(dense.bytes, 1), math.nextafter(1.0, 0.0)))

    def met_by(self, cost: Cost, dense: Cost) -> bool:
        """Is every share, and the number of bytes, at or below its target? Milliseconds take more than a cost to tell."""
        few = self.most_bytes is None or cost.bytes <= self.most_bytes
        return few and all(getattr(cost, m) <= share * getattr(dense, m) for m, share in self.shares.items())

    def __str__(self) -> str:
        parts = [f"{m}={share:g}" for m, share in self.shares.items()]
        parts += [f"bytes={self.most_bytes:,}"] if self.most_bytes is not None else []
        parts += [f"left_out={self.left_out}"] if self.left_out is not None else []
        return ", ".join([*parts, *([f"latency={self.latency_ms:.4g} ms"] if self.latency_ms is not None else [])])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, Real) or math.isnan(share):
        raise TargetError(f"target {name}={share!r} is not a number: give the share to keep, such as {name}=0.7")
    if not 0 < float(share) < 1:
        whole = ", or a whole number of bytes" if name == "bytes" else ""
        raise TargetError(
            f"target {name}={share:g} is out of range: give the share to keep, above 0 and below 1 (0.7 keeps 70%){whole}"
        )


def _check_milliseconds(given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 < float(given) < math.inf:
        raise TargetError(f"target latency_ms={given!r} is out of range: give milliseconds above 0, such as 20")
