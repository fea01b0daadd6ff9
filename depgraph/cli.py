"""The command `depgraph`: inspect a model, prune it, export it. The one module that may import all three packages."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import depgraph
from depgraph import cli_options as o
from depgraph import interruption
from depgraph.cli_data import Amount, TextData, measured, read_text, text_data
from depgraph.cli_models import Loaded, Loading, load_model
from depgraph.cli_onnx import is_onnx, prune_file, refuse_options, refuse_score
from depgraph.cli_output import CODES, Steps, check_vacant, new_folder, print_json, printing, say, show_error, showing
from depgraph.cli_tables import (
    cut_json,
    cut_lines,
    graph_json,
    plan_json,
    print_axes,
    print_result,
    recipes_table,
)
from depgraph.cutting.report import CutReport
from depgraph.errors import DataError
from depgraph.inspecting import Inspection
from depgraph.options import Options
from depgraph.page import html_page
from depgraph.plan import Plan
from depgraph.storage import check_free, written

app = typer.Typer(
    name="depgraph",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make a PyTorch or ONNX model smaller: find what is coupled, cut it out, prove the result right, export it.",
    epilog="MODEL is a transformers folder, a folder saved by depgraph, an ONNX file, or file.py:function, which returns "
    "(module, args), (module, args, kwargs) or a dict with model, args, kwargs, batches (to score with) and loss "
    "(a function of the model's output and the batch).\n\n"
    f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in CODES.items())}.",
)


@app.command()
def inspect(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    long: o.Long = False,
    strict: o.Strict = False,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    base: o.Base = "",
    html: o.HtmlFile = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show the axes of a model: what can be removed together, what it would save, what is fixed."""
    if html is not None:
        check_free(html, "--html")
    with printing(as_json) as out:
        steps = Steps()
        with steps("loading"):
            if is_onnx(model):
                refuse_options(device, dtype, base)
            loaded = None if is_onnx(model) else load_model(model, Loading(device, dtype, seed, base))
        with steps("tracing"):
            given = (model,) if loaded is None else (loaded.model, loaded.args, loaded.kwargs)
            graph = depgraph.trace(*given, strict=strict)
            found = Inspection(graph)
        if html is not None:
            with steps("drawing"):
                written(html, html_page(found))
    with showing():
        if as_json:
            print_json(graph_json(found), out)
        elif long:
            out.print(graph.show(), markup=False, highlight=False, soft_wrap=True)
        else:
            print_axes(found, out)
            if graph.note:
                out.print(graph.note, markup=False, highlight=False)


@app.command()
def prune(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    keep: o.Keep,
    score: o.Score = "magnitude",
    allocation: o.Allocation = "",
    recipe: o.Recipe = "",
    data: o.Data = None,
    out: o.Out = None,
    onnx: o.Onnx = False,
    scope: o.Scope = "auto",
    round_to: o.RoundTo = 1,
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
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make a model smaller, check the result, and write it."""
    if dry_run:
        out = None
    elif out is None:
        raise typer.BadParameter("--out FOLDER says where the pruned model goes (or give --dry-run)")
    options: dict[str, Any] = {"scope": scope, "round_to": round_to, "floor": floor, "form": form}
    options |= {"protect": tuple(protect or ()), "only": tuple(only or ())}
    if allocation and scope not in ("auto", "global"):
        raise typer.BadParameter(f"--allocation {allocation} spreads the budget itself: leave out --scope {scope}")
    if allocation and recipe:
        raise typer.BadParameter(f"--recipe {recipe} spreads the budget itself: leave out --allocation {allocation}")
    loading, amount = Loading(device, dtype, seed, base), Amount(batches, length, seed)
    target = o.parse_keep(keep)
    _prune(o.Wish(model, target, loading, score, allocation, recipe, data, amount, out, onnx, options, as_json))


@app.command()
def recipes(as_json: o.Json = False) -> None:
    """List the recipes: published methods with all their parts, what they need, and what they cost."""
    from importance.recipes import RECIPES

    if as_json:
        print_json({name: entry.described() for name, entry in RECIPES.items()}, Console())
        return
    Console().print(recipes_table(RECIPES))


@app.command()
def export(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    out: o.OnnxFile = None,
    opset: o.Opset = 20,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    base: o.Base = "",
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a model as an ONNX file, and check it in ONNX Runtime."""
    from exporters import OnnxOptions, to_onnx

    if out is None and not Path(model).is_dir():
        raise typer.BadParameter("--out FILE says where the ONNX file goes")
    file = out or Path(model) / "model.onnx"
    check_free(file, "--out")
    with printing(as_json) as console:
        steps = Steps()
        with steps("loading"):
            loaded = load_model(model, Loading(device, dtype, seed, base))
        with steps("exporting"):
            options = OnnxOptions(opset=opset, dtype="float32")
            report = to_onnx(loaded.model, loaded.args, file, loaded.kwargs, options=options)
    with showing():
        if as_json:
            print_json(_onnx_json(report), console)
        else:
            console.print(str(report), markup=False, highlight=False, soft_wrap=True)


def _prune(wish: o.Wish) -> None:
    from importance import allocations, named, needs_data

    if is_onnx(wish.model):
        if wish.recipe:
            raise DataError(f"recipe {wish.recipe!r} needs a PyTorch model: give a file a --score such as magnitude")
        if needs_data(wish.score):
            refuse_score(wish.score)
        prune_file(wish, named(wish.score, seed=wish.loading.seed))
        return
    steps = Steps()
    allocation = allocations.named(wish.allocation) if wish.allocation else None
    if wish.out is not None:
        check_vacant(wish.out)
    if _needs_data(wish) and wish.data is None and ".py:" not in wish.model:
        what = f"recipe {wish.recipe!r}" if wish.recipe else f"score {wish.score!r}"
        raise DataError(f"{what} needs data: give a text file with --data, or one that doesn't, such as magnitude")
    text = read_text(wish.data) if wish.data is not None else ""
    with printing(wish.json) as console, new_folder(wish.out) as folder:
        with steps("loading"):
            loaded = load_model(wish.model, wish.loading)
            found = text_data(loaded, wish.data, text, wish.amount) if wish.data is not None else TextData([], [])
        with steps("tracing"):
            graph = depgraph.trace(loaded.model, loaded.args, loaded.kwargs)
        with steps("scoring and planning"):
            o.check_patterns(graph, wish.options)
            if wish.recipe:
                plan, report = _by_recipe(wish, graph, loaded, found)
            else:
                scorer = _scorer(wish, loaded, found, steps)
                scorer = scorer if allocation is None else allocations.Allocated(scorer, allocation)
                plan = graph.plan(scorer, wish.target, **wish.options)
                report = None
        if folder is None:
            result, shown = plan_json(plan), ["", *plan.notes, "dry run: nothing was cut or written"]
        else:
            with steps("cutting and checking"):
                report = report or plan.apply_with_report(form=wish.options["form"])
            result, shown = _write_all(wish, loaded, found, (plan, report), folder, steps)
    with showing():
        if wish.json:
            print_json(result, console)
            return
        print_result(graph.dense_cost, plan, shown, console)


def _scorer(wish: o.Wish, loaded: Loaded, found: TextData, steps: Steps) -> Any:
    from importance import named, needs_data

    if not needs_data(wish.score):
        return named(wish.score, seed=wish.loading.seed)
    batches = found.calibration or loaded.batches
    if batches is None:
        raise DataError(f"score {wish.score!r} needs data: let {wish.model} return a dict with 'batches'")
    return named(wish.score, batches=steps.over(batches, "scoring"), loss=loaded.loss, seed=wish.loading.seed)


def _needs_data(wish: o.Wish) -> bool:
    from importance import needs_data
    from importance.recipes import entry_of

    return entry_of(wish.recipe).needs != "nothing" if wish.recipe else needs_data(wish.score)


def _by_recipe(
    wish: o.Wish, graph: depgraph.DependencyGraph, loaded: Loaded, found: TextData
) -> tuple[Plan, CutReport | None]:
    """The plan of a recipe, and the report of its cut, unless nothing is to be written."""
    from importance.recipes import named

    recipe = named(wish.recipe, found.calibration or loaded.batches, loaded.loss, wish.loading.seed)
    given = {option: value for option, value in wish.options.items() if value != getattr(Options(), option)}
    if wish.out is None:
        return recipe.plan(graph, wish.target, **given), None
    return recipe.reported(graph, wish.target, **given)


def _write_all(
    wish: o.Wish, loaded: Loaded, found: TextData, made: tuple[Plan, CutReport], folder: Path, steps: Steps
) -> tuple[dict[str, Any], list[str]]:
    """The result as data, and the lines that say it."""
    from importance.losses import own_loss

    plan, report = made
    with steps("measuring"):
        figures = measured(loaded.model, found, report, own_loss)
    with steps("writing"):
        saved = _write(loaded, plan, report, folder)
    exported = None
    if wish.onnx:
        with steps("exporting to ONNX"):
            exported = _onnx(loaded, report, folder, wish.out or folder)
    result = cut_json(plan, report) | {
        "perplexity": figures,
        "onnx": _onnx_json(exported) if exported else None,
        "folder": str(wish.out),
        "format": saved.format,
        "files": sorted(path.name for path in folder.iterdir()),
    }
    lines = cut_lines(plan, report, figures)
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


def _onnx(loaded: Loaded, report: CutReport, folder: Path, final: Path) -> Any:
    from exporters import OnnxOptions, to_onnx

    options = OnnxOptions(dtype="float32")
    made = to_onnx(report.model, loaded.args, folder / "model.onnx", loaded.kwargs, options=options)
    return replace(made, path=final / "model.onnx")


def _onnx_json(report: Any) -> dict[str, Any]:
    return {**asdict(report), "path": str(report.path)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; every error is one sentence on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
        try:
            return _run(given)
        except Exception as error:
            return _interrupted() if interruption.happened() else show_error(error, debug)
        finally:
            logging.disable(logging.NOTSET)


def _run(given: list[str]) -> int:
    try:
        done = typer.main.get_command(app).main(args=given, prog_name="depgraph", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        if interruption.happened() or not hasattr(error, "format_message"):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "depgraph")
        if sentence := error.format_message().rstrip("."):  # none where the help was shown for want of arguments
            say(f"error: {sentence} (see {where} --help)")
        return int(getattr(error, "exit_code", 2))
    if done == interruption.CODE:
        return _interrupted()
    return done if isinstance(done, int) else 0


def _interrupted() -> int:
    say(interruption.SENTENCE)
    return interruption.CODE
