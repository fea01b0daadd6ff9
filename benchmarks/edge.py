"""From a budget to a folder that runs, for real models: what `depgraph build` makes of half the bytes and 70% of the time.

python benchmarks/edge.py --data DIR [--report benchmarks/edge.md]      all models, a fresh process each; DIR as for quality.py
python benchmarks/edge.py --models tiny-llama digits-cnn --size 0.6 --time 0.8 --quantise int8-dynamic

Budgets are shares of the dense model's ONNX file and of its time in ONNX Runtime on the example, measured once. One thread; dense
and pruned run in turns, the lowest tenth of 20 runs counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import quality_report  # noqa: E402
import quality_subjects  # noqa: E402

from exporters.building import Budget, Subject, Ways, build  # noqa: E402
from importance.sweeping import Figure  # noqa: E402

IMAGES, TEXTS = 32, 2  # in a run that is timed
COLUMNS = ("model", "budget", "way", "parameters", "file", "time", "predicted", "quality", "rounds", "seconds")


def subject_of(found: quality_subjects.Subject) -> Subject:
    """The same as a build is asked for."""
    higher = quality_report.HIGHER_IS_BETTER[found.metric]
    figure = Figure(found.metric, "held-out data", higher)
    rows = IMAGES if found.metric == "accuracy" else TEXTS
    batches = found.batches(0)
    example = {name: value[:rows] for name, value in batches[0].items() if name != "labels"}
    return Subject(found.model, (), example, found.quality, figure, batches, found.loss)


def made(subject: Subject, shares: tuple[float | None, float | None], ways: Ways) -> dict[str, Any]:
    """The row of one model: its budget, what was taken, what was tried."""
    size, time_share = shares
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        built = build(subject, Budget(latency_share=time_share, bytes_share=size), Path(folder) / "out", ways)
    best = built.best
    return {
        "budget": built.story.making.target,
        "way": f"{best.recipe}, {best.precision}",
        "parameters": built.story.after.params / built.story.before.params,
        "file": best.bytes / next(file.dense_bytes for file in built.story.files if file.dense_bytes),
        "time": best.ratio,
        "predicted": best.predicted,
        "quality": [built.story.quality[0].before, best.quality],
        "metric": subject.figure.name,
        "rounds": best.rounds,
        "seconds": time.process_time() - started,
        "tried": [[one.recipe, one.precision, one.bytes, one.ratio, one.quality, one.why] for one in built.tried],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['model']} | {row['failed']} |" + " |" * (len(COLUMNS) - 2))
            continue
        before, after = row["quality"]
        said = {
            **row,
            "parameters": f"{row['parameters']:.1%}",
            "file": f"{row['file']:.1%}",
            "time": f"{row['time']:.1%}",
            "predicted": "" if row["predicted"] is None else f"{row['predicted']:.1%}",
            "quality": f"{row['metric']} {before:.4g} -> {after:.4g}",
            "seconds": f"{row['seconds']:.0f}",
        }
        lines.append("| " + " | ".join(str(said[name]) for name in COLUMNS) + " |")
    return "\n".join(lines)


def one(args: argparse.Namespace) -> None:
    """Print the row of the one model that was asked for, as JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    name = args.models[0]
    known = quality_subjects.subjects(args.data, args.weights, quality_subjects.Sizes())
    try:
        ways = Ways(tuple(args.recipes), ("float32", *args.quantise), shares=(), probes=0)
        row = made(subject_of(known[name]()), (args.size, args.time), ways)
    except Exception as error:
        row = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps({"model": name, **row}), file=sys.__stdout__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="stories260k-llama, deep12-llama and text")
    parser.add_argument(
        "--weights", type=Path, default=Path("out") / "digits", help="of examples/digits.py (%(default)s)"
    )
    names = list(quality_subjects.subjects(Path(), Path(), quality_subjects.Sizes()))
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--recipes", nargs="+", default=["best"])
    parser.add_argument(
        "--quantise", nargs="*", default=["int8-dynamic"], help="precisions beside float32 (%(default)s)"
    )
    parser.add_argument("--size", type=float, default=0.5, help="of the dense file (%(default)s)")
    parser.add_argument("--time", type=float, default=0.7, help="of the dense model's (%(default)s)")
    parser.add_argument("--report", type=Path, help="write the table as Markdown here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    rows = []
    for name in args.models:
        given = ["--one", "--data", args.data, "--weights", args.weights, "--models", name, "--size", args.size]
        given += ["--time", args.time, "--recipes", *args.recipes, "--quantise", *args.quantise]
        done = subprocess.run([sys.executable, __file__, *map(str, given)], capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        rows.append(
            json.loads(last) if done.returncode == 0 and last else {"model": name, "failed": done.stderr[-300:]}
        )
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if args.report is not None:
        args.report.write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
