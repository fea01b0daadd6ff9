"""`inspect` and `prune` for a MODEL that is an ONNX file: what comes out is a file too."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import depgraph
from depgraph.cli.options import Wish
from depgraph.cli.output import Steps, print_json, printing, showing
from depgraph.cli.tables import plan_json, print_result
from depgraph.errors import CheckpointError, ModelError, ScoreError
from depgraph.onnx_door.saving import write
from depgraph.plan import Plan
from depgraph.scoring import Scorer
from depgraph.storage import check_free


def is_onnx(model: str) -> bool:
    """Does MODEL name an ONNX file?"""
    return Path(model).suffix == ".onnx"


def refuse_options(device: str, dtype: str, base: str) -> None:
    """Raise ModelError for options that say something of PyTorch models."""
    for option, given, usual in (("--device", device, "cpu"), ("--dtype", dtype, "auto"), ("--base", base, "")):
        if given != usual:
            raise ModelError(f"{option} {given} is for PyTorch models: leave it out for an ONNX file")


def refuse_score(score: str) -> None:
    """Raise ScoreError for a score that needs more than the file."""
    raise ScoreError(
        f"score {score!r} needs a model that runs in PyTorch, which an ONNX file isn't: load the PyTorch model, or take "
        "magnitude or random"
    )


def check_out(wish: Wish) -> None:
    """Raise an error unless --out names a file that can be written."""
    if wish.out is None:
        return
    if wish.out.suffix != ".onnx":
        raise CheckpointError(f"--out {wish.out} names no ONNX file: give one such as smaller.onnx")
    check_free(wish.out, "--out")


def prune_file(wish: Wish, scorer: Scorer) -> None:
    """Make a file smaller, check the result, and write it."""
    check_out(wish)
    refuse_options(wish.loading.device, wish.loading.dtype, wish.loading.base)
    steps = Steps()
    with printing(wish.json) as console:
        with steps("reading"):
            graph = depgraph.trace(wish.model)
        with steps("scoring and planning"):
            plan = graph.plan(scorer, wish.target, **wish.options)
        result, lines = plan_json(plan), ["", *plan.notes, "dry run: nothing was cut or written"]
        if wish.out is not None:
            result, lines = _cut_and_write(plan, wish.out, steps)
    with showing():
        if wish.json:
            print_json(result, console)
            return
        print_result(graph.dense_cost, plan, lines, console)


def _cut_and_write(plan: Plan, out: Path, steps: Steps) -> tuple[dict[str, Any], list[str]]:
    with steps("cutting and checking"):
        report = plan.apply_with_report()
    with steps("writing"):
        files = write(report.model, out)  # type: ignore[arg-type]
    check = report.check
    result = plan_json(plan) | {
        "form": report.form,
        "check": asdict(check) | {"vacuous": check.vacuous} if check else None,
        "notes": list(report.notes),
        "files": [str(file) for file in files],
    }
    return result, ["", f"check: {check}", *report.notes, f"wrote {', '.join(map(str, files))}"]
