"""`depgraph build`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.data import Amount, TextData, read_text, text_data
from depgraph.cli.file_points import refuse_gradients
from depgraph.cli.keeping import limit_of
from depgraph.cli.models import Loaded, Loading, in_float32, load_model
from depgraph.cli.onnx_files import folder_of, is_onnx
from depgraph.cli.output import Steps, check_vacant, print_json, printing, say, showing
from depgraph.cli.points import check_names
from depgraph.cli.quality import measure_of
from depgraph.errors import DataError, ModelError, ScoreError
from depgraph.plain import plain
from depgraph.wording import counted

if TYPE_CHECKING:
    from exporters.building import Built, Candidate, Subject


Latency = Annotated[
    str,
    typer.Option(
        help="the longest that one run may take (of a text, one window of --length tokens): 20ms, or 0.5 of the dense model's"
    ),
]
Size = Annotated[
    str,
    typer.Option(
        help="the largest that a file which runs alone may be, with its weights (encoder and decoder are one): 30MB, or 0.5 of the dense"
    ),
]
Folder = Annotated[Path, typer.Option("--out", help="a new folder for all that is made", show_default=False)]
Recipes = Annotated[
    str, typer.Option(help="recipes or scores to try, with commas; empty: best with data, magnitude without")
]
Quantise = Annotated[
    str,
    typer.Option(
        help="precisions that may be used beside float32, with commas: float16, int8-dynamic, int8-static, int4"
    ),
]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="of the device it is for, as `depgraph profile` makes it")
]
DepthScore = Annotated[
    str,
    typer.Option(
        help="how blocks that may be left out are found, as for prune; auto: by the loss, or without data by magnitude; none: all stay"
    ),
]
Threads = Annotated[int, typer.Option(help="threads that ONNX Runtime computes with", min=1)]
Open = Annotated[
    list[str] | None,
    typer.Option("--open", help="a size that an ONNX file leaves open, such as height=320 (repeatable)"),
]


@app.command()
def build(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    out: Folder,
    latency: Latency = "",
    size: Size = "",
    data: o.Data = None,
    recipes: Recipes = "",
    quantise: Quantise = "",
    depth_score: DepthScore = "auto",
    profile: ProfileFile = None,
    threads: Threads = 1,
    scope: o.Scope = "auto",
    round_to: o.RoundTo = "1",
    floor: o.Floor = 0.0,
    protect: o.Protect = None,
    only: o.Only = None,
    batches: o.Batches = 16,
    length: o.Length = None,
    seed: o.Seed = 0,
    base: o.Base = "",
    opset: o.Opset = 20,
    open_sizes: Open = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make a model keep within milliseconds and megabytes, and leave a folder that runs, with a report."""
    from exporters.building import Budget, Ways, file_subject
    from exporters.building import build as make
    from exporters.timing.profile import Profile

    sizes, given = (
        o.parse_sizes(open_sizes, "--open"),
        {"--base": base, "--length": length, "--opset": opset, "--open": open_sizes},
    )
    _refuse_of_file(model, given, scope, _listed(recipes))
    check_vacant(out)
    limits, deep = _limits(latency, size), _depth(depth_score, scope, recipes, data=data is not None or ".py:" in model)
    asked_scope, scope = scope, "auto" if scope in ("depth", "both") else scope
    with printing() as console:
        steps = Steps()
        device = Profile.load(profile) if profile is not None else None
        budget = Budget(**limits, threads=threads, profile=device)
        precisions = ("float32", *_precisions(quantise))
        check_names(_listed(recipes), data=data is not None or ".py:" in model)
        options: dict[str, Any] = {"scope": scope, "round_to": o.rounding(round_to), "floor": floor}
        options |= {"protect": tuple(protect or ()), "only": tuple(only or ())}
        with steps("loading"):
            if is_onnx(model):
                subject = file_subject(model, None if data is None else folder_of(data), sizes)
            else:
                subject = _loaded(model, Loading("cpu", "auto", seed, base), data, Amount(batches, length, seed))
        names = _listed(recipes) or ["magnitude" if subject.batches is None else "best"]
        check_names(names, data=subject.batches is not None)
        check_depth(depth_score, asked_scope, data=subject.batches is not None)
        ways = Ways(tuple(names), precisions, options, seed, opset=opset, **deep)
        command = shlex.join(["depgraph", *sys.argv[1:]])
        made = make(subject, budget, out, ways, step=steps, command=command)
    with showing():
        _show(made, console, as_json)


def _loaded(model: str, loading: Loading, data: Path | None, amount: Amount) -> Subject:
    """A PyTorch model with what came with it, or a text."""
    stored = load_model(model, loading)
    loaded = in_float32(stored)
    found = TextData([], [])
    if data is not None:
        found = text_data(loaded, data, read_text(data), amount)
    if loaded is not stored:
        say("note: the model is built in float32, in which budgets and files are: --quantise float16 allows fewer bits")
    return _subject(loaded, found, data is None)


def _refuse_of_file(model: str, given: Mapping[str, Any], scope: str, names: list[str]) -> None:
    """Raise ModelError for what an ONNX file can't be asked, or a PyTorch model; ScoreError for scores that need gradients."""
    if not is_onnx(model):
        if given["--open"]:
            raise ModelError("--open is for ONNX files: leave it out for a PyTorch model")
        return
    for option, usual in (("--base", ""), ("--length", None), ("--opset", 20)):
        if given[option] != usual:
            raise ModelError(f"{option} {given[option]} is for PyTorch models: leave it out for an ONNX file")
    if scope == "both":
        raise ScoreError(
            "--scope both compares changes of the loss, which an ONNX file doesn't give: load the PyTorch model, or leave it out"
        )
    refuse_gradients(names)


def _subject(loaded: Loaded, found: TextData, own: bool) -> Subject:
    from exporters.building import Subject

    measure = measure_of(loaded, found)
    batches = list(loaded.batches) if own and loaded.batches is not None else found.calibration or None
    kwargs = loaded.kwargs if own else _one_window(loaded, found)
    return Subject(
        loaded.model, loaded.args, kwargs, measure.of, measure.figure, batches, loaded.loss, loaded.tokenizer
    )


def _one_window(loaded: Loaded, found: TextData) -> dict[str, Any]:
    """One window of the text: what a run takes whose time is limited."""
    window = {name: tensor[:1] for name, tensor in found.calibration[0].items() if name != "labels"}
    return window if loaded.kwargs.keys() == window.keys() else loaded.kwargs


def _depth(named: str, scope: str, recipes: str, *, data: bool) -> dict[str, Any]:
    """How blocks are left out, as `Ways` takes it; raises typer.BadParameter for what contradicts, and as `check_depth` does."""
    if scope == "depth" and (named == "none" or recipes):
        other = "--depth-score none" if named == "none" else f"--recipes {recipes}"
        raise typer.BadParameter(f"--scope depth leaves blocks out and nothing else: leave out {other}")
    if scope == "both" and named != "auto" and named.partition(":")[0] != "loss":
        raise typer.BadParameter(
            f"--scope both compares changes of the loss, which --depth-score {named} doesn't give: take loss, or leave it out"
        )
    if scope == "both" and not data:
        raise DataError(
            "--scope both compares changes of the loss: give a text with --data, or let file.py:function give 'batches'"
        )
    check_depth(named, scope, data=data)
    shares: dict[str, Any] = {"depth": {"depth_shares": (1.0,)}, "both": {"depth_shares": ("both",)}}
    return {"depth": named, **shares.get(scope, {})}


def check_depth(named: str, scope: str, *, data: bool) -> None:
    """Raise ScoreError for a name that is no depth score's, DataError where it, or the scope, needs data and there are none."""
    from importance.choices import pick
    from importance.depth import depth_names, depth_needs_data

    if scope == "both" and not data:
        raise DataError(
            "--scope both compares changes of the loss: give a text with --data, or let file.py:function give 'batches'"
        )
    if named in ("auto", "none"):
        return
    pick(dict.fromkeys(depth_names()), named.partition(":")[0], "depth score")
    if depth_needs_data(named) and not data:
        raise DataError(
            f"--depth-score {named} needs data: give a text file with --data, let file.py:function give 'batches', or take magnitude"
        )


def _limits(latency: str, size: str) -> dict[str, Any]:
    """Milliseconds and bytes, or shares of them, as `Budget` takes them; raises typer.BadParameter."""
    if not latency and not size:
        raise typer.BadParameter("give a budget: --latency 20ms, --size 30MB, or both")
    ms, time_share = limit_of("--latency", latency) if latency else (None, None)
    most, size_share = limit_of("--size", size) if size else (None, None)
    whole = None if most is None else round(most)
    return {"latency_ms": ms, "latency_share": time_share, "bytes": whole, "bytes_share": size_share}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _precisions(text: str) -> list[str]:
    from exporters.building import PRECISIONS

    names = [name for name in _listed(text) if name != "float32"]
    for name in names:
        if name not in PRECISIONS:
            raise typer.BadParameter(f"--quantise {name!r} is no precision: choose among {', '.join(PRECISIONS[1:])}")
    return names


def _show(made: Built, console: Console, as_json: bool) -> None:
    best = made.best
    if as_json:
        tried = [_tried_json(one) for one in made.tried]
        print_json({"folder": str(made.folder), "tried": tried, "report": plain(made.story)}, console)
        return
    console.print(_table(made))
    story = made.story
    for timing in story.timings:
        ms = f"{timing.dense_ms:.3g} -> {timing.pruned_ms:.3g} ms" if timing.dense_ms and timing.pruned_ms else ""
        console.print(f"{timing.kind}: {ms} ({timing.what})", markup=False, highlight=False, soft_wrap=True)
    if story.check is not None:
        console.print(f"check: {story.check}", markup=False, highlight=False, soft_wrap=True)
    for note in story.notes:
        say(f"note: {note}")
    cut = (
        "nothing had to go"
        if best.report is None
        else f"by {best.recipe}, in {counted(best.rounds, 'round', 'rounds')}"
    )
    console.print(
        f"wrote {made.folder} ({best.precision}, {cut}): open report.html, or run python {made.folder}/run.py"
    )


def _table(made: Built) -> Table:
    figure = made.story.quality[0]
    table = Table(
        "way", "parameters", "blocks", "file", "time", f"{figure.name} (dense {figure.before:.4g})", "", box=None
    )
    before = made.story.before.params
    for one in made.tried:
        params = before if one.report is None else one.report.after.params
        table.add_row(
            f"{one.recipe}, {one.precision}",
            f"{params / before:.1%}",
            f"-{len(one.plan.branches)}" if one.plan is not None and one.plan.branches else "",
            f"{one.bytes:,} B",
            f"{one.ratio:.1%}",
            f"{one.quality:.4g}{'' if one.of_file else ' (of float32)'}",
            one.why or ("taken" if one is made.best else "within"),
        )
    return table


def _tried_json(one: Candidate) -> dict[str, Any]:
    cost = None if one.report is None else plain(one.report.after)
    return {
        "recipe": one.recipe,
        "precision": one.precision,
        "left_out": [] if one.plan is None else list(one.plan.branches),
        "cost": cost,
        "bytes": one.bytes,
        "measured_share": one.ratio,
        "predicted_share": one.predicted,
        "quality": one.quality,
        "rounds": one.rounds,
        "why_not": one.why,
    }
