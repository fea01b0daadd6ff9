"""CPU time of trace, plan, cut and check against the size of the graph, for families of models that grow.

python benchmarks/scaling.py                                all families, best of two processes a size (15 minutes)
python benchmarks/scaling.py --families dense unet --repeats 3 --json figures.json
python benchmarks/scaling.py --families decoder --largest 40
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.speed import fitted, show  # noqa: E402

PHASES = ("trace", "plan", "cut", "check")
KEEP = 0.7
_MARK = "figures:"


def work(family: str, size: int) -> dict[str, Any]:
    """What a fresh process does: one model through all phases; CPU seconds, and how large its graph is."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    import depgraph
    import importance
    from benchmarks import ours
    from benchmarks.measuring import Stopwatch
    from benchmarks.scaling_models import FAMILIES
    from depgraph.cutting.applying import apply
    from depgraph.cutting.verifying import Verifier
    from depgraph.garbage import uncollected

    ours.warm_up()
    case, watch = FAMILIES[family].build(size), Stopwatch()
    with watch.phase("trace"):
        graph = depgraph.trace(case.model, case.args)
    with watch.phase("plan"):
        plan = graph.plan(importance.Magnitude(), depgraph.Target(params=KEEP))
    with uncollected(), watch.phase("cut"):
        report = apply(plan, check="none")
    with uncollected(), watch.phase("check"):
        Verifier(plan).check(report.model)
    nodes = [node for node in graph.capture.exported.graph.nodes if node.op == "call_function"]
    return {
        "operators": len(nodes),
        "edges": sum(len(node.all_input_nodes) for node in nodes),
        "axes": len(graph.axes),
        "form": report.form,
        **{phase: figures["cpu"] for phase, figures in watch.phases.items()},
    }


def measure(family: str, size: int, repeats: int, limit: float) -> dict[str, Any]:
    """The best CPU seconds of each phase over fresh processes with one thread; "failed" where one didn't end well."""
    runs = [_fresh(family, size, limit) for _ in range(repeats)]
    failed = next((run for run in runs if "failed" in run), None)
    return failed or {**runs[0], **{phase: min(run[phase] for run in runs) for phase in PHASES}}


def _fresh(family: str, size: int, limit: float) -> dict[str, Any]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", family, str(size)]
    environment = {**os.environ, **one, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return json.loads(lines[-1][len(_MARK) :])


def size_rows(family: str, by: str, runs: dict[int, dict[str, Any]]) -> list[list[str]]:
    """One row a size: how large the graph is and the CPU seconds of each phase."""
    rows = []
    for size, run in runs.items():
        if "failed" in run:
            rows.append([family, f"{size} {by}", f"failed: {run['failed']}"])
            continue
        counts = [str(run[k]) for k in ("operators", "edges", "axes")]
        rows.append([family, f"{size} {by}", *counts, *(f"{run[phase]:.2f}" for phase in PHASES), run["form"]])
    return rows


def exponent_row(family: str, runs: dict[int, dict[str, Any]]) -> list[str]:
    """Exponents of each phase over what grows, of its three largest sizes: operators, edges, or the size itself."""
    good = [(size, run) for size, run in runs.items() if "failed" not in run][-3:]
    if len(good) < 2:
        return [family, "too few sizes"]
    row = [family]
    grows = good[-1][1]["operators"] > 1.2 * good[0][1]["operators"]
    for phase in PHASES:
        over = ["operators", "edges"] if grows else ["size"]
        points = [[(float({"size": size, **run}[x]), run[phase]) for size, run in good] for x in over]
        row.append(" / ".join(f"{fitted(p):.2f}" for p in points))
    return [*row, "operators / edges" if grows else "size"]


def report(found: dict[str, dict[int, dict[str, Any]]], by: dict[str, str]) -> None:
    """Print both tables."""
    show(
        "CPU seconds by size",
        ["family", "size", "operators", "edges", "axes", *PHASES, "cut as"],
        [row for family, runs in found.items() for row in size_rows(family, by[family], runs)],
    )
    show(
        "Exponents over the three largest sizes",
        ["family", *PHASES, "over"],
        [exponent_row(family, runs) for family, runs in found.items()],
    )


def main() -> None:
    """Measure what the command line asks for, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", help="these only")
    parser.add_argument("--largest", type=int, help="no sizes above this one")
    parser.add_argument("--repeats", type=int, default=2, help="fresh processes a size; the best counts")
    parser.add_argument("--limit", type=float, default=300, help="seconds of wall time until a process is given up")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--worker", nargs=2, metavar=("FAMILY", "SIZE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(_MARK + json.dumps(work(given.worker[0], int(given.worker[1]))))
        return
    from benchmarks.scaling_models import FAMILIES

    unknown = set(given.families or ()) - set(FAMILIES)
    if unknown:
        parser.error(f"there is no family {sorted(unknown)[0]!r}; there are {', '.join(FAMILIES)}")
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for family in given.families or FAMILIES:
        sizes = [size for size in FAMILIES[family].sizes if given.largest is None or size <= given.largest]
        print(f"measuring {family} ...", file=sys.stderr, flush=True)
        found[family] = {size: measure(family, size, max(given.repeats, 1), given.limit) for size in sizes}
    report(found, {name: family.by for name, family in FAMILIES.items()})
    if given.json:
        partial = given.json.with_name(given.json.name + ".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(partial, given.json)


if __name__ == "__main__":
    main()
