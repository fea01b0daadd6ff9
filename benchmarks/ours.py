"""This library on one model, phase by phase: trace (capture and coupling), plan, cut, check."""

from __future__ import annotations

from typing import Any

import depgraph
import importance
from benchmarks.measuring import Stopwatch, forward_seconds, parameters, resident, tiny
from benchmarks.models import Case
from depgraph.capture.capturing import capture
from depgraph.cutting.applying import apply_in_place
from depgraph.cutting.verifying import Verifier
from depgraph.dependency import DependencyGraph
from depgraph.garbage import uncollected


def warm_up() -> None:
    """Trace, prune and check a tiny model."""
    model, args = tiny()
    depgraph.trace(model, args).plan(importance.Magnitude(), depgraph.Target(params=0.6), scope="axis").apply_()


def prune(case: Case, keep: float) -> dict[str, Any]:
    """Prune to the share `keep` of the parameters, check; the phases, and what came of it."""
    forward, dense = forward_seconds(case.model, case.args), parameters(case.model)
    base, watch = resident(), Stopwatch()
    graph = _trace(case, watch)
    with watch.phase("plan"):
        plan = graph.plan(importance.Magnitude(), depgraph.Target(params=keep), scope="axis")
    verifier = Verifier(plan)
    with uncollected(), watch.phase("cut"):
        report = apply_in_place(plan, check="none")
    with uncollected(), watch.phase("check"):
        found = verifier.check(report.model)
    result = {"forward": forward, "base": base, "kept": parameters(case.model) / dense, "axes": len(graph.axes)}
    return {**result, "phases": watch.phases, "error": found.error, "runs": True}


def axes(case: Case) -> dict[str, Any]:
    """Only the axes: capture and coupling."""
    base, watch = resident(), Stopwatch()
    graph = _trace(case, watch)
    return {"base": base, "phases": watch.phases, "axes": len(graph.axes)}


def _trace(case: Case, watch: Stopwatch) -> DependencyGraph:
    """`depgraph.trace` in two phases."""
    with uncollected():
        with watch.phase("capture"):
            captured = capture(case.model, case.args, {})
        with watch.phase("coupling"):
            graph = DependencyGraph(case.model, case.args, {}, captured, frozenset(captured.program.by_products))
    return graph
