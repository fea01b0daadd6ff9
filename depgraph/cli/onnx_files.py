"""`inspect` and `prune` for a MODEL that is an ONNX file: what comes out is a file too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import depgraph
from depgraph.cli.depth import depth_needs, plan_with_depth
from depgraph.cli.models import Loading
from depgraph.cli.options import Wish, check_patterns
from depgraph.cli.output import Steps, print_json, printing, showing
from depgraph.cli.tables import plan_json, print_result
from depgraph.cli.times import predicted, timed
from depgraph.cutting.report import CutReport
from depgraph.errors import CheckpointError, DataError, ModelError, ScoreError
from depgraph.npz import NpzFolder
from depgraph.onnx_door.loading import input_names
from depgraph.onnx_door.saving import write
from depgraph.plan import Plan
from depgraph.storage import check_free
from depgraph.target import Target


def is_onnx(model: str) -> bool:
    """Does MODEL name an ONNX file?"""
    return Path(model).suffix == ".onnx"


def refuse_options(model: str, loading: Loading, sizes: dict[str, int]) -> None:
    """Raise ModelError for options that say something of PyTorch models where there is a file, and the other way round."""
    if not is_onnx(model):
        if sizes:
            raise ModelError(f"--size {next(iter(sizes))} is for ONNX files: leave it out for a PyTorch model")
        return
    for option, given, usual in (
        ("--device", loading.device, "cpu"),
        ("--dtype", loading.dtype, "auto"),
        ("--base", loading.base, ""),
    ):
        if given != usual:
            raise ModelError(f"{option} {given} is for PyTorch models: leave it out for an ONNX file")


def check_out(wish: Wish) -> None:
    """Raise an error unless --out names a file that can be written."""
    if wish.out is None:
        return
    if wish.out.suffix != ".onnx":
        raise CheckpointError(f"--out {wish.out} names no ONNX file: give one such as smaller.onnx")
    check_free(wish.out, "--out")


def prune_file(wish: Wish) -> None:
    """Make a file smaller, check the result, and write it."""
    from importance.recipes import for_file

    check_out(wish)
    refuse_gradients(wish)
    batches = _batches(wish)
    steps = Steps()
    with printing() as console:
        with steps("reading"):
            graph = depgraph.trace(wish.model, example_of(wish.model, wish.sizes, batches), free=wish.free)
        check_patterns(graph, wish.options)
        target = wish.keep.target(graph, steps)
        with steps("scoring and planning"):
            if wish.recipe:
                recipe = for_file(wish.recipe, batches, seed=wish.loading.seed)
                plan, report = wish.made_by(recipe, graph, target)
            else:
                plan, report = _planned(wish, target, graph, batches), None
        if wish.plot is not None:
            with steps("drawing"):
                plan.plot(wish.plot)
        result, lines = plan_json(plan), ["", *plan.notes, "dry run: nothing was cut or written"]
        times = target.latency and predicted(target.latency, plan)
        if wish.out is not None:
            result, lines = _cut_and_write(plan, report, wish.out, steps)
            times = target.latency and timed(target.latency, plan, wish.out, steps)
        if times:
            result["latency"] = times.data
            lines.append(times.line)
    with showing():
        if wish.json:
            print_json(result, console)
            return
        print_result(graph.dense_cost, plan, lines, console)


def refuse_gradients(wish: Wish) -> None:
    """Raise ScoreError for a score or a recipe that needs gradients, which a file doesn't give."""
    from importance import needs_gradients
    from importance.recipes import for_file

    if wish.recipe:
        for_file(wish.recipe, [], seed=wish.loading.seed)
    elif needs_gradients(wish.score):
        raise ScoreError(
            f"score {wish.score!r} needs gradients, which an ONNX file doesn't give: load the PyTorch model, or take magnitude, or "
            "with --data one from activations such as wanda-sp, flap or obs"
        )


def _batches(wish: Wish) -> NpzFolder | None:
    """Calibration data; raises DataError where they are needed and missing, or no folder of .npz files."""
    from importance import needs_data
    from importance.recipes import entry_of

    what = f"recipe {wish.recipe!r}" if wish.recipe else f"score {wish.score!r}"
    needed = entry_of(wish.recipe).needs != "nothing" if wish.recipe else needs_data(wish.score)
    if not needed and depth_needs(wish):
        what, needed = f"depth score {wish.depth_score!r}", True
    if wish.data is None and needed:
        raise DataError(
            f"{what} needs data: give a folder of .npz files, one a batch with arrays by input name, with --data"
        )
    return folder_of(wish.data) if wish.data is not None else None


def folder_of(data: Path) -> NpzFolder:
    """The batches that --data names; raises DataError where it is no folder of .npz files."""
    if not data.is_dir():
        raise DataError(f"--data {data} is no folder: an ONNX file takes one of .npz files, arrays by input name")
    return NpzFolder(data)


def example_of(model: str, sizes: Mapping[str, int], batches: NpzFolder | None) -> dict[str, Any]:
    """What to trace a file on: sizes that were given, else the first batch, else what is made up."""
    if sizes or batches is None:
        return dict(sizes)
    names = input_names(model)
    return {name: array for name, array in next(iter(batches)).items() if name in names}


def _planned(wish: Wish, target: Target, graph: Any, batches: NpzFolder | None) -> Plan:
    from importance import allocations, named

    scorer = named(wish.score, batches=batches, seed=wish.loading.seed)
    if wish.allocation:
        scorer = allocations.Allocated(scorer, allocations.named(wish.allocation))
    return plan_with_depth(wish, target, graph, scorer, (batches, None))


def _cut_and_write(plan: Plan, report: CutReport | None, out: Path, steps: Steps) -> tuple[dict[str, Any], list[str]]:
    with steps("cutting and checking"):
        report = report or plan.apply_with_report()
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
