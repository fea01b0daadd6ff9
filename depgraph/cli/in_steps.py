"""`prune` by a recipe that cuts in steps: what each left, and one plan of the first model for all, where that can be told."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.console import Console

from depgraph.checkpoint import save
from depgraph.cli.data import TextData, measured
from depgraph.cli.formats import onnx_beside
from depgraph.cli.models import Loaded
from depgraph.cli.options import Wish
from depgraph.cli.output import Steps
from depgraph.cli.reporting import write_report
from depgraph.cli.tables import cost_table, onnx_json
from depgraph.cli.times import timed
from depgraph.dependency import DependencyGraph
from depgraph.options import Options
from depgraph.story.in_steps import tell_steps
from depgraph.target import Target


class Given(NamedTuple):
    """What is pruned, and to what."""

    loaded: Loaded
    found: TextData
    graph: DependencyGraph
    target: Target


class InSteps(NamedTuple):
    """What was made, as data and as lines."""

    data: dict[str, Any]
    lines: list[str]


def is_in_steps(name: str) -> bool:
    """Does the recipe of that name cut in steps? Raises ScoreError for an unknown name."""
    from importance.recipes import named

    return bool(name) and named(name, []).schedule is not None


def prune_in_steps(wish: Wish, given: Given, folder: Path | None, steps: Steps) -> InSteps:
    """Prune, and write the model, its report and its ONNX file where they are asked for."""
    from importance.recipes import named

    if folder is None:
        raise typer.BadParameter(
            f"--dry-run shows a plan, and --recipe {wish.recipe} makes one in every step, of what the last one left: give --out"
        )
    loaded, found, graph, target = given
    recipe = named(wish.recipe, found.calibration or loaded.batches, loaded.loss, wish.loading.seed)
    options = Options.changed(wish.options)
    with steps("pruning in steps"):
        done = recipe.prune(graph, target, **options)
    assert done.scheduled is not None
    with steps("writing"):
        saved = save(done.model, folder)
        if hasattr(loaded.tokenizer, "save_pretrained"):
            loaded.tokenizer.save_pretrained(folder)
    lines = ["", *str(done.scheduled).splitlines()]
    lines += [] if done.compensated is None else [str(done.compensated)]
    exported = None
    with steps("measuring"):
        quality = measured(graph.model, done.model, found)
    lines += quality.lines
    if wish.onnx:
        exported = onnx_beside(loaded, done.model, folder, wish.out or folder)
        lines.append(str(exported))
    if wish.report:
        with steps("writing the report"):
            write_report(wish, tell_steps(graph, done.model, done.scheduled.steps), quality, folder)
    times = None
    if done.plan is not None:
        done.plan.save(folder / "plan.json")
        times = target.latency and timed(target.latency, done.plan, folder / "model.onnx", steps)
    lines += [times.line] if times else []
    files = sorted(path.name for path in folder.iterdir())
    data = {
        "model": graph.name,
        "before": asdict(graph.dense_cost),
        "after": asdict(done.after),
        "kept": done.after.share_of(graph.dense_cost),
        "steps": [
            {"number": s.number, "keep": s.keep, "cost": asdict(s.cost), "latency": s.latency}
            for s in done.scheduled.steps
        ],
        "error": done.error,
        "perplexity": quality.figures,
        "onnx": onnx_json(exported) if exported else None,
        "latency": times.data if times else None,
        "folder": str(wish.out),
        "format": saved.format,
        "files": files,
    }
    lines += [f"wrote {wish.out}: {', '.join(files)}", f"format: {saved.format} ({saved.why})"]
    return InSteps(data, lines)


def print_in_steps(graph: DependencyGraph, made: InSteps, console: Console) -> None:
    """The costs before and after, and what every step left."""
    from depgraph.widths import Cost

    console.print(cost_table(graph.dense_cost, Cost(**made.data["after"])))
    for line in made.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
