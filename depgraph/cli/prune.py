"""`depgraph prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

import depgraph
from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.data import Amount, TextData, measured, read_text, text_data
from depgraph.cli.depth import asked, depth_needs, plan_with_depth
from depgraph.cli.formats import onnx_beside
from depgraph.cli.in_steps import Given, is_in_steps, print_in_steps, prune_in_steps
from depgraph.cli.keeping import parse_keep
from depgraph.cli.models import Loaded, Loading, load_model
from depgraph.cli.onnx_files import is_onnx, prune_file, refuse_options
from depgraph.cli.output import Steps, check_vacant, new_folder, print_json, printing, showing
from depgraph.cli.reporting import write_report
from depgraph.cli.tables import (
    cut_json,
    cut_lines,
    onnx_json,
    plan_json,
    print_result,
)
from depgraph.cli.times import predicted, timed
from depgraph.cutting.report import CutReport
from depgraph.errors import DataError, ModelError
from depgraph.plan import Plan
from depgraph.story import tell


@app.command()
def prune(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    keep: o.Keep = "",
    depth: o.Depth = None,
    depth_score: o.DepthScore = "",
    plot: o.Plot = None,
    profile: o.DeviceProfile = None,
    score: o.Score = "",
    allocation: o.Allocation = "",
    recipe: o.Recipe = "",
    data: o.Data = None,
    out: o.Out = None,
    onnx: o.Onnx = False,
    report: o.Report = False,
    scope: o.Scope = "auto",
    round_to: o.RoundTo = "1",
    floor: o.Floor = 0.0,
    protect: o.Protect = None,
    only: o.Only = None,
    form: o.Form = "auto",
    batches: o.Batches = 16,
    length: o.Length = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    base: o.Base = "",
    size: o.Size = None,
    free: o.Free = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make a model smaller, check the result, and write it."""
    if dry_run:
        out = None
    elif out is None:
        raise typer.BadParameter("--out FOLDER says where the pruned model goes (or give --dry-run)")
    options: dict[str, Any] = {"scope": scope, "round_to": o.rounding(round_to), "floor": floor, "form": form}
    options |= {"protect": tuple(protect or ()), "only": tuple(only or ())}
    if allocation and scope not in ("auto", "global"):
        raise typer.BadParameter(f"--allocation {allocation} spreads the budget itself: leave out --scope {scope}")
    if score and recipe:
        raise typer.BadParameter(f"--recipe {recipe} scores by itself: leave out --score {score}")
    if allocation and recipe:
        raise typer.BadParameter(f"--recipe {recipe} spreads the budget itself: leave out --allocation {allocation}")
    loading, amount = Loading(device, dtype, seed, base), Amount(batches, length, seed)
    kept = parse_keep(keep, profile, depth)
    what = (
        score or "magnitude",
        allocation,
        recipe,
        data,
        amount,
        out,
        onnx,
        options,
        as_json,
        o.parse_sizes(size),
        tuple(free or ()),
    )
    _prune(asked(o.Wish(model, kept, loading, *what, report=report), depth_score, plot))


def _prune(wish: o.Wish) -> None:
    from importance import allocations

    refuse_options(wish.model, wish.loading, wish.sizes)
    if is_onnx(wish.model):
        if wish.report:
            raise ModelError("--report writes into the folder of a PyTorch model: leave it out for an ONNX file")
        prune_file(wish)
        return
    steps = Steps()
    allocation = allocations.named(wish.allocation) if wish.allocation else None
    if wish.out is not None:
        check_vacant(wish.out)
    if wish.data is None and ".py:" not in wish.model and (what := _needing_data(wish)):
        raise DataError(f"{what} needs data: give a text file with --data, or one that doesn't, such as magnitude")
    text = read_text(wish.data) if wish.data is not None else ""
    with printing() as console, new_folder(wish.out) as folder:
        given = _given(wish, text, steps)
        if is_in_steps(wish.recipe):
            made = prune_in_steps(wish, given, folder, steps)
            with showing():
                print_json(made.data, console) if wish.json else print_in_steps(given.graph, made, console)
            return
        with steps("scoring and planning"):
            plan, report = _planned(wish, given, allocation, steps)
        if wish.plot is not None:
            with steps("drawing"):
                plan.plot(wish.plot)
        latency = given.target.latency
        if folder is None:
            result, shown = plan_json(plan), ["", *plan.notes, "dry run: nothing was cut or written"]
            times = latency and predicted(latency, plan)
        else:
            with steps("cutting and checking"):
                report = report or plan.apply_with_report(form=wish.options["form"])
            result, shown = _write_all(wish, given, (plan, report), folder, steps)
            times = latency and timed(latency, plan, folder / "model.onnx", steps)
        if times:
            result["latency"] = times.data
            shown.append(times.line)
    with showing():
        if wish.json:
            print_json(result, console)
            return
        print_result(given.graph.dense_cost, plan, shown, console)


def _given(wish: o.Wish, text: str, steps: Steps) -> Given:
    with steps("loading"):
        loaded = load_model(wish.model, wish.loading)
        found = text_data(loaded, wish.data, text, wish.amount) if wish.data is not None else TextData([], [])
    with steps("tracing"):
        graph = depgraph.trace(loaded.model, loaded.args, loaded.kwargs, free=wish.free)
    o.check_patterns(graph, wish.options)
    return Given(loaded, found, graph, wish.keep.target(graph, steps))


def _planned(wish: o.Wish, given: Given, allocation: Any, steps: Steps) -> tuple[Plan, CutReport | None]:
    """The plan, and the report of its cut where a recipe has cut already."""
    from importance import allocations, recipes

    loaded, found, graph, target = given
    batches = found.calibration or loaded.batches
    if wish.recipe:
        recipe = recipes.named(wish.recipe, batches, loaded.loss, wish.loading.seed)
        return wish.made_by(recipe, graph, target)
    scorer = _scorer(wish, loaded, batches, steps)
    if allocation is not None:
        scorer = allocations.Allocated(scorer, allocation)
    return plan_with_depth(wish, target, graph, scorer, (batches, loaded.loss)), None


def _scorer(wish: o.Wish, loaded: Loaded, batches: Any, steps: Steps) -> Any:
    from importance import named, needs_data

    if not needs_data(wish.score):
        return named(wish.score, seed=wish.loading.seed)
    if batches is None:
        raise DataError(f"score {wish.score!r} needs data: let {wish.model} return a dict with 'batches'")
    return named(wish.score, batches=steps.over(batches, "scoring"), loss=loaded.loss, seed=wish.loading.seed)


def _needing_data(wish: o.Wish) -> str:
    """What of a wish needs data; empty where nothing does."""
    from importance import needs_data
    from importance.recipes import entry_of

    if wish.recipe:
        return f"recipe {wish.recipe!r}" if entry_of(wish.recipe).needs != "nothing" else ""
    if needs_data(wish.score):
        return f"score {wish.score!r}"
    return f"--depth-score {wish.depth_score}" if depth_needs(wish) else ""


def _write_all(
    wish: o.Wish, given: Given, made: tuple[Plan, CutReport], folder: Path, steps: Steps
) -> tuple[dict[str, Any], list[str]]:
    """The result as data, and the lines that say it."""
    loaded, found, *_ = given
    plan, report = made
    with steps("measuring"):
        quality = measured(loaded.model, report.model, found)
    with steps("writing"):
        saved = _write(loaded, plan, report, folder)
    if wish.report:
        write_report(wish, tell(plan, report), quality, folder)
    exported = None
    if wish.onnx:
        with steps("exporting to ONNX"):
            exported = onnx_beside(loaded, report.model, folder, wish.out or folder)
    result = cut_json(plan, report) | {
        "perplexity": quality.figures,
        "onnx": onnx_json(exported) if exported else None,
        "folder": str(wish.out),
        "format": saved.format,
        "files": sorted(path.name for path in folder.iterdir()),
    }
    lines = cut_lines(plan, report) + quality.lines
    if exported:
        lines.append(str(exported))
    lines.append(f"wrote {wish.out}: {', '.join(result['files'])}")
    return result, [*lines, f"format: {saved.format} ({saved.why})"]


def _write(loaded: Loaded, plan: Plan, report: CutReport, folder: Path) -> Any:
    from depgraph.checkpoint import save

    saved = save(report.model, folder)
    if hasattr(loaded.tokenizer, "save_pretrained"):
        loaded.tokenizer.save_pretrained(folder)
    plan.save(folder / "plan.json")
    return saved
