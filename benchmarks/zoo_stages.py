"""One model type from its name to a pruned ONNX file: built tiny, run, cut by a quarter, checked, saved, loaded, exported."""

from __future__ import annotations

import copy
import importlib
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import zoo_configs
import zoo_inputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.models.auto import configuration_auto, modeling_auto

import depgraph
import exporters
import importance
from depgraph.capture.capturing import quiet
from depgraph.cutting.settling import Settler
from depgraph.errors import CutError, ExportError, PlanError

ROOT = Path(__file__).resolve().parent.parent
SHARE, LEAST_REMOVED, CLASSES, LARGEST = 0.25, 0.10, 4, 30_000_000
NO_OP = 0.2  # less than this share of what can go at all is no quarter
HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
    "TIME_SERIES_PREDICTION",
)
Tell = Callable[[dict[str, Any]], None]


@dataclass
class Built:
    """A tiny model in eval mode, the keyword arguments that it runs on, and how it came about."""

    model: nn.Module
    inputs: dict[str, Tensor]
    level: int


class Unbuilt(Exception):
    """No class, level or input of a type works; `stage` is how far it came."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


def model_types() -> list[str]:
    """The names of all model types that the installed transformers registers a config for."""
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def classes_of(model_type: str) -> list[type[nn.Module]]:
    """Classes of a type: heads in the order of `HEADS`, the bare model, others of its registries; else those of its file."""
    names = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS] + ["MODEL_MAPPING_NAMES"]
    names += [n for n in dir(modeling_auto) if n.endswith("MAPPING_NAMES") and n not in names]
    registries = [getattr(modeling_auto, n) for n in names if n != "CONFIG_MAPPING_NAMES"]
    found = [registry[model_type] for registry in registries if model_type in registry]
    flat = dict.fromkeys(n for f in found for n in ((f,) if isinstance(f, str) else f))
    return [getattr(transformers, n) for n in flat if hasattr(transformers, n)] or list(_in_file(model_type))


def _in_file(model_type: str) -> Iterator[type[nn.Module]]:
    """The models beside a config that are made from it, for a type that stands in no registry."""
    config = configuration_auto.CONFIG_MAPPING[model_type]
    try:
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return
    for name, held in vars(module).items():
        is_model = isinstance(held, type) and issubclass(held, transformers.PreTrainedModel)
        if is_model and held.config_class is config and not name.endswith("PreTrainedModel"):
            yield held


def build(model_type: str) -> Built:
    """The first class, level and inputs that run; raises Unbuilt with the first reason of the furthest stage."""
    stages = ["config", "construct", "forward"]
    failures: dict[str, str] = {}
    try:
        default = configuration_auto.CONFIG_MAPPING[model_type]()
        classes = classes_of(model_type)[:CLASSES]
    except Exception as error:
        raise Unbuilt("config", reason(error)) from error
    for number, level in enumerate(zoo_configs.LEVELS):
        for cls in classes:
            stage = stages[0]
            try:
                config = zoo_configs.shrink(default, level)
                stage = stages[1]
                require_small(cls, config)
                torch.manual_seed(0)
                model = lively(cls(config).eval().float())
                stage = stages[2]
                return Built(model, running_inputs(model), number)
            except Exception as error:
                failures.setdefault(stage, f"{cls.__name__}: {reason(error)}")
    if not classes:
        raise Unbuilt("config", "transformers registers no model class for this config")
    last = [s for s in stages if s in failures][-1]
    raise Unbuilt(last, failures[last])


def require_small(cls: type[nn.Module], config: Any) -> None:
    """Raise ValueError for more parameters than this is worth, before they are made."""
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > LARGEST:
        raise ValueError(f"the zoo's smallest that may work has {count / 1e6:.0f} million parameters")


def lively(model: nn.Module) -> nn.Module:
    """Move every parameter a little: zeros and ones, which hide errors, and layer scales near zero become ordinary numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = parameter.ndim > 1 and parameter.shape[-1] > 1 and parameter.numel()
            parameter.add_(noise * (0.5 / parameter[0].numel() ** 0.5 if wide else 0.2))
    return model


def running_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs on which the model gives finite tensors; raises what the likeliest inputs raised."""
    failure: Exception | None = None
    for make in zoo_inputs.candidates(model):
        try:
            inputs = make()
            found = run(model, inputs)
            if found and all(t.isfinite().all() for t in found):
                return inputs
            failure = failure or ValueError("the outputs are no tensors" if not found else "the outputs aren't finite")
        except Exception as error:
            failure = failure or error
    raise failure or LookupError("the zoo knows no inputs for it")


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The floating-point tensors of what a model gives."""
    torch.manual_seed(0)
    with torch.no_grad(), quiet(model):
        leaves = pytree.tree_leaves(model(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def quarter(graph: depgraph.DependencyGraph, share: float = SHARE) -> depgraph.Plan:
    """A plan that removes a share of every axis, at least one group, as far as groups may go and ties between sizes allow."""
    rng = np.random.default_rng(0)
    order = {a.name: rng.permutation(np.flatnonzero(a.prunable)) for a in graph.axes}
    cap = {a.name: min(len(order[a.name]), a.size - 1) for a in graph.axes}
    wanted = {a.name: min(max(1, int(share * a.size)), cap[a.name]) for a in graph.axes if cap[a.name]}
    for name in wanted:
        size, step = graph[name].size, graph.widths.step(name)
        wanted[name] = max(0, size - -(-(size - wanted[name]) // step) * step)
    counts = Settler(graph.sizes, order, cap, frozenset(wanted)).settle(wanted)
    return graph.cut_plan({name: order[name][:count] for name, count in counts.items() if count})


def prunable_share(graph: depgraph.DependencyGraph) -> float:
    """The share of the parameters that goes when of every axis only one group and what may not go stay."""
    most = {a.name: np.flatnonzero(a.prunable)[int(a.prunable.all()) :] for a in graph.axes}
    left = graph.cost({name: groups for name, groups in most.items() if len(groups)}).params
    return 1 - left / max(graph.dense_cost.params, 1)


def reached_parameters(graph: depgraph.DependencyGraph) -> int:
    """The parameters that the captured call reads, tied ones once."""
    tensors = {v.target for v in graph.capture.program.values.values() if v.kind == "parameter" and v.used}
    held = {id(p): p.numel() for n, p in graph.model.named_parameters(remove_duplicate=False) if n in tensors}
    return sum(held.values())


def cut_type(model_type: str, tell: Tell, with_onnx: bool) -> None:
    """All stages of one type, telling after each what is known; a stage that fails tells its reason and ends it."""
    tell({"stage": "build"})
    try:
        built = build(model_type)
    except Unbuilt as error:
        tell({"failed": error.stage, "reason": str(error)})
        return
    name = type(built.model).__name__
    tell({"class": name, "level": built.level, "inputs": sorted(built.inputs), "done": ["construct", "forward"]})
    with tempfile.TemporaryDirectory() as folder:
        for known in steps(built, Path(folder), with_onnx):
            tell(known)


def steps(built: Built, folder: Path, with_onnx: bool) -> Iterator[dict[str, Any]]:
    """What is known before and after each stage of a built model; the stage that fails is the last."""
    held: dict[str, Any] = {"built": built, "folder": folder}
    for stage, step in list(STAGES.items())[: None if with_onnx else -1]:
        yield {"stage": stage}
        started = time.process_time()
        try:
            known = step(held)
        except Exception as error:
            yield {"failed": stage, "reason": reason(error), "where": where(error)}
            return
        yield {**known, "done": [stage], f"{stage}_s": round(time.process_time() - started, 2)}


def _trace(held: dict[str, Any]) -> dict[str, Any]:
    built = held["built"]
    graph = held["graph"] = depgraph.trace(built.model, kwargs=built.inputs)
    nodes = graph.capture.exported.graph.nodes
    return {
        "operators": sum(node.op == "call_function" for node in nodes),
        "params": sum(p.numel() for p in built.model.parameters()),
        "reached": reached_parameters(graph),
        "axes": len(graph.axes),
        "unknown": sorted(graph.unknown),
        "prunable": round(prunable_share(graph), 3),
    }


def _cut_by_quarter(graph: depgraph.DependencyGraph) -> depgraph.CutReport:
    plan = quarter(graph)
    if _share(graph, plan) < LEAST_REMOVED < prunable_share(graph):
        plan = quarter(graph, 2 * SHARE)
    if not plan.removal:
        why = next((axis.why_fixed for axis in graph.axes), "no axis reaches a parameter")
        raise ValueError(f"nothing can be pruned: {why}")
    return plan.apply_with_report(form="auto")


def _share(graph: depgraph.DependencyGraph, plan: depgraph.Plan) -> float:
    return 1 - plan.cost().params / max(graph.dense_cost.params, 1)


def _cut_as_planned(graph: depgraph.DependencyGraph) -> depgraph.CutReport:
    """Where the form that a model can be cut in doesn't hold a quarter of every axis: what planning makes of the same budget."""
    target = depgraph.Target(params=1 - SHARE * prunable_share(graph))
    return graph.plan(importance.Magnitude(), target, scope="axis").apply_with_report()


def _cut(held: dict[str, Any]) -> dict[str, Any]:
    graph = held["graph"]
    try:
        report, planned = _cut_by_quarter(graph), False
    except (CutError, PlanError):
        report, planned = _cut_as_planned(graph), True
    held["pruned"] = report.model
    removed = sum(p.numel() for p in held["built"].model.parameters()) - sum(
        p.numel() for p in report.model.parameters()
    )
    share = removed / max(reached_parameters(graph), 1)
    prunable = prunable_share(graph)
    if share < (LEAST_REMOVED if prunable > LEAST_REMOVED else NO_OP * prunable):
        raise ValueError(f"only {share:.0%} of the parameters were removed where {prunable:.0%} are prunable")
    if report.check is None or report.check.skipped or report.check.vacuous:
        raise ValueError(f"the check proves nothing: {report.check}")
    return {
        "after": sum(p.numel() for p in report.model.parameters()),
        "removed": round(share, 3),
        "form": report.form,
        "planned": planned,
        "error": report.check.error,
        "captured": report.check.captured,
        "notes": [one_line(str(note)) for note in report.notes],
    }


def _save(held: dict[str, Any]) -> dict[str, Any]:
    """Save and load; a class that transformers doesn't export, part of another model, is given to `load` unpruned."""
    pruned, inputs = held["pruned"], held["built"].inputs
    saved = depgraph.save(pruned, held["folder"] / "saved")
    exported = hasattr(transformers, type(held["built"].model).__name__)
    loaded = depgraph.load(held["folder"] / "saved", None if exported else copy.deepcopy(held["built"].model))
    for a, b in zip(run(loaded, inputs), run(pruned, inputs), strict=True):
        apart, largest = float((a - b).abs().max()), float(b.abs().max())
        if not apart <= 1e-5 * largest:
            raise ValueError(f"the loaded model differs by {apart:.2g}, where the largest output is {largest:.2g}")
    return {"saved": saved.format}


def _onnx(held: dict[str, Any]) -> dict[str, Any]:
    inputs, path = held["built"].inputs, held["folder"] / "small.onnx"
    try:
        report = exporters.to_onnx(held["pruned"], (), path, kwargs=inputs)
    except ExportError as error:
        constants = getattr(error, "constants", ())
        if not constants:
            raise
        options = exporters.OnnxOptions(constants=constants)
        report = exporters.to_onnx(held["pruned"], (), path, kwargs=inputs, options=options)
    return {"onnx_error": report.max_rel_error, "onnx_notes": [one_line(note) for note in report.notes]}


STAGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "trace": _trace,
    "cut": _cut,
    "save": _save,
    "onnx": _onnx,
}


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {one_line(str(error))}"


def one_line(text: str, limit: int = 300) -> str:
    """A text without line breaks and paths of this machine."""
    text = " ".join(text.replace(str(ROOT) + "/", "").replace(str(Path.home()), "~").split())
    text = re.sub(r"\S*/(site-packages|tmp\w+)/", "", text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def where(error: BaseException) -> str:
    """The innermost place in this repository's libraries that an error, or what caused it, came through."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    found = []
    for link in chain:
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT / "depgraph") or path.is_relative_to(ROOT / "exporters"):
                found.append(f"{path.relative_to(ROOT)}:{frame.lineno}")
                break
    return " <- ".join(dict.fromkeys(found))
