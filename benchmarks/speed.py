"""Time and memory of trace, coupling, plan, cut and check, beside Torch-Pruning; see benchmarks/README.md for the method.

python benchmarks/speed.py                          everything (about half an hour; the 1B shape needs 12 GB)
python benchmarks/speed.py --quick                  two models, once
python benchmarks/speed.py --models llama-4 --no-peer --repeats 3 --json figures.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAMES = ("resnet-50", "vit-b16", "convnext-t", "llama-4", "llama-16", "llama-32", "llama-1b")
QUICK = ("resnet-50", "llama-4")
DEPTHS = (4, 8, 16, 32, 64, 80)
SHARE = 0.5
CUTTING = {"ours": ("capture", "coupling", "plan", "cut"), "peer": ("pruner", "step")}
_MARK = "figures:"


def work(tool: str, name: str) -> dict[str, Any]:
    """What a fresh process does: one tool on one model."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    from benchmarks import models

    if tool == "peer":
        from benchmarks import peer

        peer.warm_up()
        return peer.prune(models.MODELS[name](), SHARE)
    from benchmarks import ours

    ours.warm_up()
    if tool == "axes":
        return ours.axes(models.llama_70b())
    case = models.deep(int(name)) if tool == "depth" else models.MODELS[name]()
    return ours.prune(case, SHARE)


def measure(tool: str, name: str, repeats: int, limit: float) -> dict[str, Any]:
    """The medians over `repeats` fresh processes with one thread; an entry "failed" where one of them didn't end well."""
    runs = []
    for _ in range(repeats):
        run = _fresh(tool, name, limit)
        if "failed" in run:
            return run
        runs.append(run)
    return _median(runs)


def _fresh(tool: str, name: str, limit: float) -> dict[str, Any]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", tool, name]
    environment = {**os.environ, **one, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return json.loads(lines[-1][len(_MARK) :])


def _median(runs: list[Any]) -> Any:
    first = runs[0]
    if isinstance(first, dict):
        return {key: _median([run[key] for run in runs]) for key in first}
    return first if isinstance(first, (bool, str)) else statistics.median(runs)


def cpu(result: dict[str, Any], tool: str) -> float:
    """CPU seconds from the dense model to the cut one."""
    return sum(result["phases"][p]["cpu"] for p in CUTTING[tool])


def peak(result: dict[str, Any], tool: str) -> float:
    """The highest resident memory from the dense model to the cut one, in MB."""
    return max(result["phases"][p]["peak"] for p in CUTTING[tool])


def fitted(points: list[tuple[float, float]]) -> float:
    """The exponent b of y = a x^b, by least squares on the logarithms."""
    logs = [(math.log(x), math.log(max(y, 1e-6))) for x, y in points]
    mx, my = (statistics.fmean(column) for column in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def phase_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a model and tool: CPU seconds of the phases, peaks, and what is left of the model."""
    rows = []
    for name, tools in found.items():
        for tool, result in tools.items():
            if "failed" in result:
                rows.append([name, tool, f"failed: {result['failed']}"])
                continue
            times = [f"{label} {figures['cpu']:.3f}" for label, figures in result["phases"].items()]
            ran = "" if result["runs"] else ", doesn't run"
            memory = f"{peak(result, tool):.0f} MB (model {result['base']:.0f})"
            rows.append([name, tool, " · ".join(times), memory, f"{result['kept']:.2f}{ran}"])
    return rows


def ratio_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a model: what is compared, and the ratios of one run."""
    rows = []
    for name, tools in found.items():
        ours, peer = tools["ours"], tools.get("peer", {"failed": "not asked"})
        if "failed" in ours:
            continue
        check = ours["phases"]["check"]
        row = [name, f"{ours['forward']:.3f}", f"{cpu(ours, 'ours'):.2f}"]
        if "failed" in peer:
            row += ["-"] * 3
        else:
            row += [f"{cpu(peer, 'peer'):.2f}", f"{cpu(ours, 'ours') / cpu(peer, 'peer'):.2f}"]
            row += [f"{peak(ours, 'ours') / peak(peer, 'peer'):.2f}"]
        rows.append([*row, f"{check['cpu'] / ours['forward']:.1f}", f"{check['peak']:.0f}"])
    return rows


def depth_rows(found: dict[int, dict[str, Any]]) -> list[list[str]]:
    """One row a phase: CPU seconds at every depth, and the exponents over all depths and over the upper half."""
    good = {depth: run for depth, run in found.items() if "failed" not in run}
    rows = []
    for label in (*CUTTING["ours"], "check"):
        points = [(float(d), run["phases"][label]["cpu"]) for d, run in good.items()]
        upper = points[len(points) // 2 :]
        exponents = [f"{fitted(p):.2f}" if len(p) > 1 else "-" for p in (points, upper)]
        rows.append([label, *(f"{y:.3f}" for _, y in points), *exponents])
    return rows


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table as Markdown."""
    if not rows:
        return
    wide = [row + [""] * (len(head) - len(row)) for row in (head, *rows)]
    widths = [max(len(row[k]) for row in wide) for k in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in wide]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print(f"\n{title}\n\n" + "\n".join(lines), flush=True)


def report(figures: dict[str, Any]) -> None:
    """Print all tables."""
    show(
        "CPU seconds and peak memory", ["model", "tool", "CPU s", "peak", "params kept"], phase_rows(figures["models"])
    )
    head = ["model", "forward s", "ours s", "peer s", "time ours/peer", "memory ours/peer", "check/forward", "check MB"]
    show("From the dense model to the cut one, ours beside Torch-Pruning 1.6.1", head, ratio_rows(figures["models"]))
    axes = figures.get("axes")
    if axes:
        rows = [["failed", axes["failed"]]] if "failed" in axes else _axes_rows(axes)
        show("Axes of the 70B Llama shape on the meta device", ["phase", "figure"], rows)
    depths = figures.get("depths")
    if depths:
        head = ["CPU s", *(f"{d} layers" for d, run in depths.items() if "failed" not in run), "exponent", "upper half"]
        show("Time against depth (Llama, hidden 128)", head, depth_rows(depths))


def _axes_rows(axes: dict[str, Any]) -> list[list[str]]:
    rows = [[label, f"{f['cpu']:.1f} s, peak {f['peak']:.0f} MB"] for label, f in axes["phases"].items()]
    total = sum(f["cpu"] for f in axes["phases"].values())
    return [*rows, ["total", f"{total:.1f} s"], ["axes", f"{axes['axes']:.0f}"]]


def main() -> None:
    """Measure what the command line asks for, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=NAMES, help="these models only, and no further tables")
    parser.add_argument("--quick", action="store_true", help="two models and three depths, once")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure Torch-Pruning too")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a figure; their median counts")
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds of wall time after which a process is given up"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--worker", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(_MARK + json.dumps(work(*given.worker)))
        return
    repeats = 1 if given.quick else max(given.repeats, 1)
    names = given.models or (QUICK if given.quick else NAMES)
    tools = ("ours", "peer") if given.peer else ("ours",)
    figures: dict[str, Any] = {"models": {}}
    if not given.models:
        depths = DEPTHS[:3] if given.quick else DEPTHS
        figures["depths"] = {d: measure("depth", str(d), repeats, given.limit) for d in depths}
        if not given.quick:
            figures["axes"] = measure("axes", "llama-70b", 1, given.limit)
    for name in sorted(names, key=NAMES.index):
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        figures["models"][name] = {tool: measure(tool, name, repeats, given.limit) for tool in tools}
    report(figures)
    if given.json:
        partial = given.json.with_name(given.json.name + ".partial")
        partial.write_text(json.dumps(figures, indent=1) + "\n")
        os.replace(partial, given.json)


if __name__ == "__main__":
    main()
