"""The folder of a result: the file (of a language model, with its cache), what runs it, the model, the plan, the report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from depgraph.story import (
    MadeFile,
    Making,
    Quality,
    Story,
    Timing,
    TradeOff,
    stages,
    tell,
    tell_steps,
    versions,
    write_story,
)
from depgraph.story.parts import Sensitivity
from exporters.building.generating import kind_of, quality_of
from exporters.building.precisions import file_bytes
from exporters.building.search import Candidate, Search
from exporters.onnx_file import data_path

_HERE = Path(__file__).resolve().parent
MODEL, RUN, EXAMPLE, PLAN, TOKENIZER = "model.onnx", "run.py", "example.npz", "plan.json", "tokenizer.json"


@dataclass
class Told:
    """What the report has besides the result: how it was made, the trade-off, sensitivities."""

    making: Making = Making()
    tradeoff: TradeOff | None = None
    sensitivity: Sensitivity | None = None
    notes: list[str] = field(default_factory=list)


def write_result(search: Search, found: Candidate, folder: Path, told: Told) -> Story:
    """Write all of a result into a folder that exists, and tell what it is; raises ExportError where a file can't be made."""
    with search.step("writing"):
        files, more = _generating(search, found, folder, told)
        files += _plain(search, found, folder)
        files += search.source.kept(found.model, folder, found.precision)
        if found.plan is not None:
            found.plan.save(folder / PLAN)
        story = _story(search, found, told)
        story = story.with_(files=tuple(files), quality=(*story.quality, *more))
        write_story(story, folder)
    return story


def _generating(search: Search, found: Candidate, folder: Path, told: Told) -> tuple[list[MadeFile], list[Quality]]:
    """The files that generate, of a model that does, with their quality; a note where they can't be made."""
    subject, made = search.subject, search.generated(found)
    if made is None:
        lost = kind_of(subject.model, subject) is not None
        told.notes += ["no files that generate were made, as the model was cut as a graph"] if lost else []
        return [], []
    if made.why:
        told.notes.append(made.why)
        return [], []
    kind, place = made.kind, folder / made.kind.folder
    told.notes += made.notes
    shutil.copytree(made.folder, place)
    if kind.needs_tokenizer and not (place / TOKENIZER).exists():
        told.notes.append(f"{RUN} times {MODEL}, as the tokenizer has no {TOKENIZER} to read texts with")
    else:
        shutil.copy(_HERE / kind.script, folder / RUN)
    told.notes += _above(kind.named, kind.bytes(place), search.budget.bytes)
    files = [
        MadeFile(f"{kind.folder}/{name}", f"{what}, {found.precision}", file_bytes(place / name))
        for name, what in kind.files.items()
    ]
    if found.precision == "float32":  # its tokens are the model's, whose quality is told
        return files, []
    quality, why = quality_of(kind, place, found.model, subject)
    told.notes += [why] if why else []
    data = f"{subject.figure.data}, {kind.named} in {found.precision}"
    row = Quality(subject.figure.name, search.dense_quality, quality, subject.figure.higher_is_better, data)
    return files, [row] if quality is not None else []


def _above(name: str, size: int, most: int | None) -> list[str]:
    """What to say where the files that generate, which grow with more than weights, take more than the budget after all."""
    if most is None or size <= most:
        return []
    return [
        f"{name} take {size:,} bytes of {most:,}, though room was left for what they take more: ask for a little less"
    ]


def _plain(search: Search, found: Candidate, folder: Path) -> list[MadeFile]:
    """One forward as a file, which was measured, with the example's inputs."""
    for source, name in ((found.file, MODEL), (data_path(found.file), data_path(Path(MODEL)).name)):
        if source.exists() and source.name.removesuffix(".data") == MODEL:
            shutil.copy(source, folder / name)
    np.savez(folder / EXAMPLE, **search.example)  # type: ignore[arg-type]
    if not (folder / RUN).exists():
        shutil.copy(_HERE / "run_model.py", folder / RUN)
    dense = file_bytes(search.dense)
    return [MadeFile(MODEL, f"one run, {found.precision}", found.bytes, dense)]


def _story(search: Search, found: Candidate, told: Told) -> Story:
    graph, subject = search.graph, search.subject
    plan = found.plan if found.plan is not None else graph.cut_plan({})
    if found.steps and found.plan is None:
        story = tell_steps(graph, found.model, found.steps)
    else:
        story = tell(plan, found.report, search.pruner.scores_of(found.way, found.plan))
        story = story.with_(steps=stages(found.steps, graph.dense_cost))
    story = story if found.report is not None else story.with_(form="as it was")
    figure = subject.figure
    quality = Quality(
        figure.name,
        search.dense_quality,
        found.quality,
        figure.higher_is_better,
        figure.data + (f", {found.precision} file" if found.of_file and found.precision != "float32" else ""),
    )
    return story.with_(
        quality=(quality,),
        timings=tuple(_timings(search, found)),
        making=told.making,
        tradeoff=told.tradeoff,
        sensitivity=told.sensitivity,
        notes=(*story.notes, *([bad] if (bad := figure.warning(found.quality)) else []), *search.notes, *told.notes),
    )


def _timings(search: Search, found: Candidate) -> list[Timing]:
    here = "" if search.budget.profile is None else ", on this machine"
    threads, what = search.budget.threads, f"{MODEL} on {search.sizes}"
    measured = found.times
    said = [Timing(what + here, "measured", measured[0], measured[1], threads, 1 / found.ratio)]
    if search.latency is not None and found.predicted is not None:
        dense = search.latency.dense_ms
        said.insert(0, Timing(what, "predicted", dense, dense * found.predicted, threads, 1 / found.predicted))
    return said


def settings_of(search: Search) -> dict[str, str]:
    """What a result was made with, besides the recipe."""
    ways, budget = search.ways, search.budget
    said = {"budget": str(budget), "threads": str(budget.threads), "sizes": search.sizes}
    said |= {"recipes tried": ", ".join(ways.recipes), "precisions tried": ", ".join(ways.precisions)}
    return said | {name: str(value) for name, value in ways.options.items() if value not in ((), "auto", 1, 0.0)}


def making_of(search: Search, found: Candidate, command: str, made: str) -> Making:
    """How it was made, with the versions of what made it."""
    return Making(
        command=command,
        recipe=found.recipe,
        target=str(search.budget),
        settings=settings_of(search),
        seeds={"calibration": search.ways.seed},
        versions=versions(),
        made=made,
    )


__all__ = ["Told", "making_of", "settings_of", "write_result"]
