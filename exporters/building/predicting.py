"""A latency model for a build: always where time is limited, else where it costs little to measure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from depgraph.dependency import DependencyGraph
from depgraph.errors import DepgraphError
from exporters.building.asked import Budget
from exporters.feeds import Feeds
from exporters.timing.measure import session, timed
from exporters.timing.model import MeasuredLatency, graph_of_file

_RUNS = {True: 30, False: 10}  # of each operator, where time is limited and where it is but told
_SLOW = 1.0  # seconds of a run of the dense model, above which operators are measured only where time is limited


class Told(NamedTuple):
    """Whom to tell: `step` gives a context for what is being done, `notes` grow."""

    step: Callable[[str], AbstractContextManager[Any]]
    notes: list[str]


def predicting(
    graph: DependencyGraph, dense: Path, example: Feeds, budget: Budget, told: Told
) -> MeasuredLatency | None:
    """How long what widths of `graph` take, on the device of the budget's profile or here, where its file is `dense`.

    None, and a note, where the budget doesn't limit it and the model is slow to measure, or can't be measured. Raises as
    `MeasuredLatency.of` does where it limits it.
    """
    limited = budget.timed
    if not limited and budget.profile is None and _seconds(dense, example, budget.threads) > _SLOW:
        told.notes.append(f"times aren't predicted, as a run takes more than {_SLOW:g} s and --latency isn't given")
        return None
    try:
        with told.step("measuring operators"):
            found = _measured(graph, dense, example, budget)
    except DepgraphError as error:
        if limited:
            raise
        told.notes.append(f"times aren't predicted: {error}")
        return None
    told.notes.extend(found.notes)
    if budget.profile is not None and (other := budget.profile.here()):
        told.notes.append(
            f"predicted times are those of the profile, measured ones of this machine: the profile {other}"
        )
    return found


def _measured(graph: DependencyGraph, dense: Path, example: Feeds, budget: Budget) -> MeasuredLatency:
    """A device's profile is of the file as it is exported for that; here, the dense file is looked at."""
    if budget.profile is not None:
        return MeasuredLatency.of(graph, budget.profile, threads=budget.threads)
    file, runs = graph_of_file(dense, example, graph.name), _RUNS[budget.timed]
    return MeasuredLatency.of(graph, runs=runs, threads=budget.threads, file=file)


def _seconds(path: Path, example: Feeds, threads: int) -> float:
    """How long a file runs for once."""
    opened = session(path, threads)
    given = {value.name: example[value.name] for value in opened.get_inputs()}
    return timed(lambda: opened.run(None, given), threads) / 1000
