"""The folder of a result: the file (of a language model, with its cache), what runs it, the model, the plan, the report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import depgraph
from depgraph.errors import ExportError
from depgraph.story import (
    MadeFile,
    Making,
    Quality,
    Story,
    Timing,
    TradeOff,
    tell,
    versions,
    write_story,
)
from depgraph.story.parts import Sensitivity
from exporters.building.asked import Subject
from exporters.building.precisions import file_bytes
from exporters.building.search import Candidate, Search
from exporters.genai import GenaiOptions, to_genai
from exporters.onnx_export import OnnxOptions
from exporters.onnx_file import data_path
from exporters.quantising import QuantOptions

_HERE = Path(__file__).resolve().parent
MODEL, GENAI, RUN, EXAMPLE, PLAN, PYTORCH = "model.onnx", "genai", "run.py", "example.npz", "plan.json", "pytorch"


@dataclass
class Told:
    """What the report has besides the result: how it was made, the trade-off, sensitivities."""

    making: Making = Making()
    tradeoff: TradeOff | None = None
    sensitivity: Sensitivity | None = None
    notes: list[str] = field(default_factory=list)


def write_result(search: Search, found: Candidate, folder: Path, told: Told) -> Story:
    """Write all of a result into a folder that exists, and tell what it is; raises ExportError where a file can't be made."""
    subject = search.subject
    with search.step("writing"):
        files = [*_text(search, found, folder, told), *_plain(search, found, folder)]
        depgraph.save(found.model, folder / PYTORCH)
        if hasattr(subject.tokenizer, "save_pretrained"):
            subject.tokenizer.save_pretrained(folder / PYTORCH)
        if found.plan is not None:
            found.plan.save(folder / PLAN)
        story = _story(search, found, told).with_(files=tuple(files))
        write_story(story, folder)
    return story


def _text(search: Search, found: Candidate, folder: Path, told: Told) -> list[MadeFile]:
    """The folder for generating text, of a model that does and has a tokenizer; a note where it can't be made."""
    subject = search.subject
    generates = getattr(found.model, "can_generate", lambda: False)()
    encoder = getattr(getattr(found.model, "config", None), "is_encoder_decoder", False)
    if not generates or encoder or subject.tokenizer is None or "input_ids" not in subject.kwargs:
        return []
    fewer = None if found.precision == "float32" else QuantOptions(found.precision)  # type: ignore[arg-type]
    prompts = _prompts(subject)
    options = GenaiOptions(OnnxOptions(opset=search.ways.opset, dtype="float32"), fewer, data=prompts)
    prompt = subject.kwargs["input_ids"] if prompts is None else prompts[0]
    try:
        to_genai(found.model, subject.tokenizer, folder / GENAI, prompt, options=options)
    except ExportError as error:
        told.notes.append(f"no folder for generating text was made: {error}")
        return []
    shutil.copy(_HERE / "run_text.py", folder / RUN)
    size = file_bytes(folder / GENAI / MODEL)
    told.notes += _above(size, search.budget.bytes)
    return [MadeFile(f"{GENAI}/{MODEL}", f"with its key-value cache, {found.precision}", size)]


def _above(size: int, most: int | None) -> list[str]:
    """What to say where the file with the cache, which is another than was measured, takes more than the budget."""
    if most is None or size <= most:
        return []
    return [
        f"{GENAI}/{MODEL}, with its cache, takes {size:,} bytes of {most:,}: the budget holds for {MODEL}; ask for less to fit both"
    ]


def _prompts(subject: Subject) -> list[Any] | None:
    found = [b["input_ids"] for b in subject.batches or () if isinstance(b, dict) and "input_ids" in b]
    return found[:4] or None


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
    story = tell(plan, found.report, search.scores_of(found))
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
        notes=(*story.notes, *search.notes, *told.notes),
    )


def _timings(search: Search, found: Candidate) -> list[Timing]:
    here = "" if search.budget.profile is None else ", on this machine"
    threads, what = search.budget.threads, f"{MODEL} on {search.subject.sizes}"
    measured = found.times
    said = [Timing(what + here, "measured", measured[0], measured[1], threads, 1 / found.ratio)]
    if search.latency is not None and found.predicted is not None:
        dense = search.latency.dense_ms
        said.insert(0, Timing(what, "predicted", dense, dense * found.predicted, threads, 1 / found.predicted))
    return said


def settings_of(search: Search) -> dict[str, str]:
    """What a result was made with, besides the recipe."""
    ways, budget = search.ways, search.budget
    said = {"budget": str(budget), "threads": str(budget.threads), "sizes": search.subject.sizes}
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
