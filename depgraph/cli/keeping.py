"""`--keep`: shares, bytes and milliseconds, and the target that they make for one graph."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from depgraph.cli.output import Steps, say
from depgraph.dependency import DependencyGraph
from depgraph.errors import TargetError
from depgraph.target import METRICS, Target

_UNITS = {"ms": 1.0, "s": 1000.0, "us": 0.001}
_SIZES = {"": 1, "B": 1, "kB": 1000, "KB": 1000, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_NUMBER = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*|%)")
_SAY = "give shares such as params=0.7 or macs=0.6,bytes=0.5, a size such as size=30MB, a time such as latency=20ms"


@dataclass(frozen=True)
class Keep:
    """What `--keep` asks for: shares and a number of bytes, as `Target` takes them, and the time in milliseconds or as a share.

    `profile` is the device profile that times are of; None measures this machine.
    """

    given: dict[str, Any] = field(default_factory=dict)
    milliseconds: float | None = None
    share: float | None = None
    profile: Path | None = None

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in self.given.items()]
        said += [f"latency={self.milliseconds:g}ms"] if self.milliseconds is not None else []
        return ", ".join([*said, *([f"latency={self.share:g}"] if self.share is not None else [])])

    @property
    def timed(self) -> bool:
        """Is time limited?"""
        return self.milliseconds is not None or self.share is not None

    def target(self, graph: DependencyGraph, steps: Steps) -> Target:
        """The target for a graph; its latency model is an `exporters.MeasuredLatency`, None where time isn't limited."""
        if not self.timed:
            return Target(**self.given)
        from exporters import MeasuredLatency, Profile

        profile = Profile.load(self.profile) if self.profile else None
        with steps("reading the profile" if profile else "measuring operators"):
            latency = MeasuredLatency.of(graph, profile)
        different = profile.here() if profile else ""
        for note in (*([f"the profile {different}"] if different else []), *latency.notes):
            say(f"warning: {note}")
        limit = self.milliseconds or (self.share or 1) * latency.ms(graph.widths.at({}))
        return Target(**self.given, latency_ms=limit, latency=latency)


def parse_keep(text: str, profile: Path | None = None, left_out: int | None = None) -> Keep:
    """`params=0.7,size=30MB,latency=20ms`, and how many blocks are left out; raises typer.BadParameter."""
    found: dict[str, Any] = {}
    if not text and left_out is None:
        raise typer.BadParameter("say what to keep, --keep params=0.7, or how many blocks to leave out, --depth 2")
    for part in text.split(",") if text else ():
        name, equals, value = part.strip().partition("=")
        name = "bytes" if name == "size" else name
        if not equals or name not in (*METRICS, "latency"):
            raise typer.BadParameter(f"--keep {text!r}: {_SAY}")
        if name in found:
            raise typer.BadParameter(f"--keep {text!r} gives {name} twice: give one of each")
        found[name] = _READ.get(name, _share)(text, value.strip())
    milliseconds, share = found.pop("latency", (None, None))
    found |= {} if left_out is None else {"left_out": left_out}
    try:
        if found or not (milliseconds or share):
            Target(**found)
    except TargetError as error:
        raise typer.BadParameter(str(error)) from error
    if profile is not None and not (milliseconds or share):
        raise typer.BadParameter(
            f"--profile {profile} says how long operators take: give a time too, such as latency=20ms"
        )
    return Keep(found, milliseconds, share, profile)


def _share(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"--keep {text!r}: {value!r} is not a number between 0 and 1") from None


def _size(text: str, value: str) -> float | int:
    """A share, or bytes: a number above 1, or one with a unit."""
    match = _NUMBER.fullmatch(value)
    if match is None or match[2] not in _SIZES:
        raise typer.BadParameter(f"--keep {text!r}: {value!r} is neither a share such as 0.5 nor a size such as 30MB")
    number = _share(text, match[1])
    return number if not match[2] and number < 2 else round(number * _SIZES[match[2]])


def _time(text: str, value: str) -> tuple[float | None, float | None]:
    """Milliseconds, or a share of the dense model's time."""
    match = _NUMBER.fullmatch(value)
    number = _share(text, match[1]) if match else 0.0
    if match is None or number <= 0 or match[2] not in ("", *_UNITS) or (not match[2] and number >= 1):
        raise typer.BadParameter(
            f"--keep {text!r}: {value!r} is neither a time such as 20ms nor a share of the dense model's, such as 0.5"
        )
    return (number * _UNITS[match[2]], None) if match[2] else (None, number)


def limit_of(option: str, text: str) -> tuple[float | None, float | None]:
    """`20ms` or `30MB` as milliseconds or bytes, or `0.5` or `50%` as a share of the dense model's; raises typer.BadParameter."""
    units, what, such = _LIMITS[option]
    match = _NUMBER.fullmatch(text.strip())
    number = _number(match[1]) if match else 0.0
    if match and match[2] in ("", "%") and 0 < number < (100 if match[2] else 1):
        return None, number / 100 if match[2] else number
    if match and (match[2] == "%" or (not match[2] and option == "--latency")):
        raise typer.BadParameter(
            f"{option} {text!r} is no share: give one above 0 and below 1 (100%) of the dense model's, such as 0.5 or 50%, "
            f"or a {what} such as {such}"
        )
    if match is None or not 0 < number * units.get(match[2], 0) < math.inf:
        raise typer.BadParameter(
            f"{option} {text!r} is no {what}: give a number and a unit, such as {option} {such}, or a share of the dense model's, 0.5"
        )
    return number * units[match[2]], None


def _number(text: str) -> float:
    """0 for what is no number, such as 1.2.3."""
    try:
        return float(text)
    except ValueError:
        return 0.0


_LIMITS: dict[str, tuple[Mapping[str, float], str, str]] = {
    "--latency": (_UNITS, "time", "20ms"),
    "--size": (_SIZES, "size", "30MB"),
}
_READ: dict[str, Any] = {"bytes": _size, "latency": _time}
