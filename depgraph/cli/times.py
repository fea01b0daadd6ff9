"""How long the pruned model takes: predicted, and measured where there is a file and the device is this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from depgraph.cli.output import Steps
from depgraph.plan import Plan


class Times(NamedTuple):
    """The same as data and as a line."""

    data: dict[str, Any]
    line: str


def predicted(latency: Any, plan: Plan) -> Times:
    """What a latency model (`exporters.MeasuredLatency`) says of a plan."""
    dense, pruned = latency.ms(plan.graph.widths.at({})), latency.ms(plan.kept())
    data = {"device": latency.profile.machine["cpu"], "dense_ms": dense, "predicted_ms": pruned, "measured": None}
    line = f"latency: {dense:.3g} ms -> {pruned:.3g} ms ({pruned / dense:.1%}) predicted on {data['device']}"
    return Times(data, line)


def timed(latency: Any, plan: Plan, file: Path, steps: Steps) -> Times:
    """The same, and what the pruned file takes beside the dense one, where it can be measured here."""
    found = predicted(latency, plan)
    if not file.is_file() or latency.profile.here():
        return found
    from exporters import predicted_and_measured

    with steps("measuring latency"):
        compared = predicted_and_measured(latency, plan, file)
    measured = {"dense_ms": compared.dense_ms, "pruned_ms": compared.pruned_ms, "share": compared.measured}
    return Times({**found.data, "measured": measured}, str(compared))
