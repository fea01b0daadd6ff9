"""Pruning at several budgets in several ways: every point is kept in a file as soon as it is made, so that a sweep can go on.

The file has a line of JSON for the settings and one for every point. Which points are worth having is the front: those that
no other beats in cost and quality.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from depgraph.errors import SweepError
from depgraph.plain import plain, rebuilt
from depgraph.story.parts import TradeOff, Trial
from depgraph.widths import Cost
from importance.side_by_side import made

FORMAT = 1
DENSE, SHIFT = "dense", "output shift"
NEAR = 0.005  # of the dense cost


@dataclass(frozen=True)
class Point:
    """What is to be made: a recipe or a score by name, and the share of `metric` ("params", "macs", "bytes") to keep.

    The name `DENSE` with a share of 1 is the model as it is.
    """

    name: str
    metric: str
    share: float

    def __str__(self) -> str:
        return self.name if self.name == DENSE else f"{self.name} at {self.metric}={self.share:g}"


@dataclass(frozen=True)
class Figure:
    """What quality is called, on what it was measured, whether more of it is better, and what guessing gets, if that is known.

    `luck` is how far from `guessing` chance may take a figure of so many samples (two standard errors).
    """

    name: str
    data: str = ""
    higher_is_better: bool = False
    guessing: float | None = None
    luck: float = 0.0

    def is_guessing(self, quality: float | None) -> bool:
        """Is it no better than choosing among all answers at random? False where that isn't known."""
        if quality is None or self.guessing is None:
            return False
        if self.higher_is_better:
            return quality <= self.guessing + self.luck
        return quality >= self.guessing - self.luck

    def warning(self, quality: float | None) -> str:
        """What to say of a quality that is no better than guessing; empty for others."""
        if not self.is_guessing(quality):
            return ""
        luck = f", give or take {self.luck:.2g}" if self.luck else ""
        return f"{self.name} {quality:.4g} is no better than guessing, which gets {self.guessing:.4g}{luck}"


NO_DATA = "the example inputs, as no data were given"


def shift_figure(data: str) -> Figure:
    """How far outputs move from the dense model's on some data, which stands for quality where nothing says what is right."""
    return Figure(SHIFT, f"{data} (a share of the outputs' length)")


@dataclass(frozen=True)
class Outcome:
    """A point that was made: its cost, its quality (None where it isn't finite), the error of the check, what it took.

    Of a file, `dense_ms` and `ms` are milliseconds of a run of the dense file and of this one, in turns.
    `refused` says why nothing could be made, if so; where `again` is set the reason may pass, and the point is tried anew in
    the next run.
    """

    point: Point
    cost: Cost | None = None
    quality: float | None = None
    figure: Figure | None = None
    error: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    refused: str = ""
    again: bool = False
    dense_ms: float | None = None
    ms: float | None = None


class Log:
    """The file of a sweep: what was made by earlier runs, and where to add to.

    Raises SweepError where the file was made with other settings, or isn't one. A line that an interruption cut short is
    taken away.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self.path, self.settings = path, dict(settings)
        self.outcomes: dict[Point, Outcome] = {}
        try:
            if path.exists():
                self._read()
        except OSError as error:
            raise self._unusable(error) from error

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome; in the file too, unless it is to be tried again."""
        self.outcomes[outcome.point] = outcome
        if outcome.again:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                if not file.tell():
                    file.write(json.dumps({"format": FORMAT, "settings": self.settings}) + "\n")
                file.write(json.dumps(plain(outcome)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> SweepError:
        return SweepError(f"{self.path} can't be used for a sweep: {error.strerror or error}")

    def _read(self) -> None:
        whole, _, rest = self.path.read_bytes().rpartition(b"\n")
        if rest:
            os.truncate(self.path, len(whole) + 1 if whole else 0)
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if not lines:
            return
        self._check(self._parsed(lines[0], 1))
        for number, line in enumerate(lines[1:], start=2):
            try:
                outcome = rebuilt(Outcome, self._parsed(line, number))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._unreadable(number) from error
            self.outcomes[outcome.point] = outcome

    def _parsed(self, line: str, number: int) -> dict[str, object]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise self._unreadable(number) from error
        if not isinstance(found, dict):
            raise self._unreadable(number)
        return found

    def _unreadable(self, number: int) -> SweepError:
        return SweepError(
            f"line {number} of {self.path} is none of a sweep: take the line away, or name another folder"
        )

    def _check(self, head: Mapping[str, object]) -> None:
        settings, before = self.settings, head.get("settings")
        if head.get("format") != FORMAT or not isinstance(before, dict):
            raise self._unreadable(1)
        for name in dict.fromkeys([*settings, *before]):
            then, now = before.get(name, "nothing"), settings.get(name, "nothing")
            if then != now:
                raise SweepError(
                    f"the sweep in {self.path.parent} was made with {name} {then}, which is {now} now: name another folder, or delete "
                    "that one to begin anew"
                )


def sweep(
    points: Sequence[Point],
    make: Callable[[Point], Outcome],
    log: Log,
    jobs: int = 1,
    tell: Callable[[Outcome], object] | None = None,
) -> list[Outcome]:
    """Make all points that the log hasn't yet, and return the outcomes of all, in their order.

    Args:
        make: makes one; with several jobs it is called in other processes, and so must be picklable.
        jobs: how many processes at most; as many work at a time as memory allows by the largest `peak_bytes` so far, the first
            one alone.
        tell: called with every outcome as it comes.

    Raises SweepError when a process dies; what `make` raises ends the sweep. What was made is in the log in any case.
    """
    wanted = dict.fromkeys(points)
    left = [point for point in wanted if point not in log.outcomes or log.outcomes[point].again]
    for outcome in made(left, make, lambda outcome: outcome.peak_bytes, jobs):
        log.add(outcome)
        if tell is not None:
            tell(outcome)
    return [log.outcomes[point] for point in wanted]


def on_front(pairs: Sequence[tuple[float, float]], higher_is_better: bool = False, near: float = NEAR) -> list[bool]:
    """Which of some (cost, quality) no other beats: one that is no worse for less, or better for no more.

    Budgets are met but for a group, so a better one whose cost is larger by up to `near` beats another too.
    """
    sign = -1.0 if higher_is_better else 1.0
    signed = [(cost, sign * quality) for cost, quality in pairs]
    return [not any(_beats(other, mine, near) for other in signed) for mine in signed]


def _beats(one: tuple[float, float], other: tuple[float, float], near: float) -> bool:
    (cost, quality), (their_cost, their_quality) = one, other
    return (quality < their_quality and cost <= their_cost + near) or (quality == their_quality and cost < their_cost)


def trade_off(outcomes: Iterable[Outcome], metric: str, chosen: Point | None = None) -> TradeOff:
    """The outcomes that have a cost and a quality as a trade-off of a story, with their front.

    Raises SweepError where the dense model, which shares are of, isn't among them.
    """
    listed = [one for one in outcomes if one.cost is not None]
    dense = next((one for one in listed if one.point.name == DENSE), None)
    if dense is None or dense.cost is None or dense.figure is None:
        raise SweepError("a trade-off needs the dense model among its points, which costs are shares of")
    whole, figure = getattr(dense.cost, metric), dense.figure
    kept = [one for one in listed if one is not dense and one.quality is not None]
    pairs = [(getattr(one.cost, metric) / whole, one.quality or 0.0) for one in kept]
    fronts = on_front(pairs, figure.higher_is_better)
    trials = tuple(
        Trial(one.point.name, share, quality, front)
        for one, (share, quality), front in zip(kept, pairs, fronts, strict=True)
    )
    number = next((k for k, one in enumerate(kept) if one.point == chosen), None)
    return TradeOff(metric, figure.name, trials, figure.higher_is_better, dense.quality, number)
