"""Saving and loading pruned models: safetensors for the weights, JSON for the cut; nothing is pickled.

A folder of the format "depgraph" holds `depgraph.json` (the record of all cuts, the names, shapes and kinds of all
tensors), `model.safetensors` and, for a model of transformers, its `config.json` from before the cut. The format "plain"
is an ordinary transformers directory with an edited config (`depgraph.uniform`), and `depgraph.json` beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from depgraph.cutting.building import with_floats
from depgraph.cutting.record import (
    Record,
    attention_of,
    classes_of,
    cuts,
    is_pretrained,
    library_class,
    original_config,
    record_beside_config,
)
from depgraph.dense import form_of, packed_modules
from depgraph.errors import CheckpointError
from depgraph.files import read_json
from depgraph.onnx_door.saving import write
from depgraph.rebuilding import (
    GRAPHS,
    Table,
    Undo,
    check_fits,
    cut_again,
    fill,
    forget_kept,
    held_tensors,
    original_from_library,
    run_once,
    take_back,
    tensor_table,
)
from depgraph.storage import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    appearing,
    check_free,
    free_folder,
    read_manifest,
    read_tensors,
    write_json,
    write_tensors,
)
from depgraph.uniform import read_plain, write_plain

FORMAT = 1
_META = torch.device("meta")
Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class SaveReport:
    """Where a model was saved, as "plain" (loads with transformers alone) or "depgraph" (`depgraph.load`), and why so."""

    path: Path
    format: str
    why: str

    def __str__(self) -> str:
        return f"saved to {self.path} in the format {self.format!r}: {self.why}"


def save(model: nn.Module, folder: Folder, *, overwrite: str = "never") -> SaveReport:
    """Save a pruned (or untouched) model so that `load` gives it back; the folder appears whole or not at all.

    A model of transformers whose layers all have equal widths becomes a plain transformers directory, if some config
    builds exactly its shapes and reloading it gives the same outputs; the report says why not.

    Args:
        model: any module; what the library cut carries its record as `model.depgraph_record`. Or an onnx_ir.Model, for which
            `folder` names a file.
        folder: where to; parents are made.
        overwrite: "never", or "replace" to let an earlier saved model go.

    Raises:
        CheckpointError: the folder exists and isn't empty, the disk is full or read-only, a tensor has no values (meta
            device) or no dense form, or a graph form was traced with inputs that can't be recorded.
    """
    if isinstance(model, onnx_ir.Model):
        check_free(Path(folder), "another path")
        return SaveReport(write(model, folder)[0], "onnx", "it is an ONNX model")
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"depgraph.save takes a torch.nn.Module, not {type(model).__name__}")
    path = free_folder(folder, overwrite)
    made = cuts(getattr(model, "depgraph_record", None))
    _check_storable(model, made)
    with appearing(path) as temporary:
        if not library_class(model):
            why = "it is cut as a graph" if _is_graph(made) else "it isn't one of transformers' own models"
        else:
            why, fields = write_plain(model, temporary)
            if not why:
                write_json(_manifest(model, "plain"), temporary / MANIFEST)
                return SaveReport(path, "plain", fields)
        if is_pretrained(model):
            _write_configs(model, temporary)
        first = {name: held.tensor for name, held in held_tensors(model).items()}
        manifest = _manifest(model, "depgraph")
        write_tensors({n: first[n] for n, e in manifest["tensors"].items() if "same_as" not in e}, temporary / WEIGHTS)
        write_json(manifest, temporary / MANIFEST)
    return SaveReport(path, "depgraph", why)


def _check_storable(model: nn.Module, made: list[Record]) -> None:
    for name, held in held_tensors(model).items():
        if held.tensor.is_meta:
            raise CheckpointError(f"{held.kind} {name!r} is on the meta device and has no values to save")
        form = form_of(held.tensor) or (
            "" if type(held.tensor.data) is torch.Tensor else type(held.tensor.data).__name__
        )
        if form:
            raise CheckpointError(f"{held.kind} {name!r} is {form}: only dense tensors can be saved")
    for module in packed_modules(model):
        raise CheckpointError(f"{module}, and its packed weights can't be saved: save the model before it is quantised")
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"module {name or type(module).__name__!r} keeps an extra state, which can't be saved: remove its get_extra_state"
            )
    for cut in made:
        if cut["form"] in GRAPHS and "unknown" in cut["inputs"]:
            raise CheckpointError(
                f"this graph form couldn't be loaded again: it was traced with an input of type {cut['inputs']['unknown']}; "
                "trace with tensors and numbers only, or cut with form='module'"
            )


def _is_graph(made: list[Record]) -> bool:
    return any(cut["form"] in GRAPHS for cut in made)


def _manifest(model: nn.Module, kind: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": kind,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "library": {"class": library_class(model), "attention": attention_of(model.config)}
        if library_class(model)
        else {},
        "record": record_beside_config(model) if kind == "plain" else getattr(model, "depgraph_record", None),
        "training": {
            "root": model.training,
            "others": [n for n, m in model.named_modules() if m.training != model.training],
        },
        "tensors": tensor_table(model),
    }


def _write_configs(model: nn.Module, folder: Path) -> None:
    config: Any = original_config(model)
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate():  # type: ignore[operator]
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr,operator]


def load(
    folder: Folder,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load what `save` wrote.

    Args:
        folder: the saved folder.
        model: the unpruned module that was cut (or a function that builds one), which is taken over and cut to shape; its
            values don't matter. Not needed for transformers' own models.
        device: where the tensors go; the CPU by default.

    Raises:
        CheckpointError: the folder is unreadable, foreign or damaged, `model` is missing, or it isn't the module that was
            cut (the message names the first parameter that doesn't fit; the module is as it was).
    """
    path, manifest = read_manifest(folder, FORMAT)
    return _load(path, manifest, model, _device("cpu" if device is None else device))


def _device(wanted: torch.device | str) -> torch.device:
    try:
        found = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"device={wanted!r} is no device: give cpu, cuda or cuda:1, say") from error
    if found == _META:
        raise CheckpointError(
            "nothing can be loaded onto the meta device, as tensors there have no values: give cpu, say"
        )
    return found


def _initialise(model: nn.Module, made: list[Record]) -> None:
    """Give lazy modules their shapes, by running them on inputs like the recorded ones."""
    if any(map(is_lazy, model.parameters())):
        run_once(model, made)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise CheckpointError(
                f"parameter {name!r} of the module that was given has no shape yet: run it once before loading"
            )


def _load(path: Path, manifest: Mapping[str, Any], model: Any, where: torch.device) -> nn.Module:
    if manifest["kind"] == "plain":  # which holds all that it needs
        return _dressed(_from_plain(path, manifest, where), manifest)
    tensors = read_tensors(path / WEIGHTS, manifest["tensors"], where)
    made = cuts(manifest["record"])
    original = _original(path, manifest, model, where)
    if model is None and made and made[0]["original"].get("modules", {}) != classes_of(original):
        original = _original(path, manifest, model, where, on=where)
        run_once(original, made)  # it replaces modules when it runs, which tensors without data may not come to
    _initialise(original, made)
    if made:
        forget_kept(original, made)
    try:
        loaded = _filled(original, (manifest["tensors"], tensors), made, where)
    except CheckpointError:
        if model is not None:
            raise
        used = _original(path, manifest, model, where)
        run_once(used, made)  # the model that was cut had been run: it may have kept something since
        loaded = _filled(used, (manifest["tensors"], tensors), made, where)
    if is_pretrained(loaded) and (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        loaded.generation_config = GenerationConfig.from_pretrained(path)
    return _dressed(loaded, manifest)


def _filled(
    original: nn.Module, saved: tuple[Table, Mapping[str, torch.Tensor]], made: list[Record], where: torch.device
) -> nn.Module:
    """The model cut again and given the tensors saved; `original` is as it was where that fails."""
    undo: list[Undo] = []
    table, tensors = saved
    try:
        check_fits(original, table, made)
        loaded = cut_again(original, made, where, undo)
        fill(loaded, table, tensors, undo)
    except BaseException:
        take_back(undo)
        raise
    return loaded


def _original(
    path: Path, manifest: Mapping[str, Any], model: Any, where: torch.device, on: torch.device = _META
) -> nn.Module:
    """The unpruned module to start from; one whose tensors are all saved is built on the device `on`."""
    if model is not None:
        built = model() if callable(model) and not isinstance(model, nn.Module) else model
        if not isinstance(built, nn.Module):
            raise CheckpointError(f"model= must be a module or a function that builds one, not {type(built).__name__}")
        return built
    for cut in cuts(manifest["record"]):
        if cut["original"].get("class"):
            return original_from_library(cut["original"], with_floats(cut["original"]["config"]), where)
    if manifest["library"]:
        return original_from_library(manifest["library"], with_floats(read_json(path / CONFIG)), on)
    raise CheckpointError(
        f"{path} holds a {manifest['class']}: pass model=, the unpruned module that was cut or a function that builds it, "
        "as in depgraph.load(folder, model=build)"
    )


def _from_plain(path: Path, manifest: Mapping[str, Any], where: torch.device) -> nn.Module:
    loaded = read_plain(path, manifest["library"]).to(where)
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(manifest["tensors"].get(name, {}).get("requires_grad", True))
    return loaded


def _dressed(model: nn.Module, manifest: Mapping[str, Any]) -> nn.Module:
    """Train or eval as it was, and the record."""
    training = manifest["training"]
    others = set(training["others"])
    for name, module in model.named_modules():
        module.training = training["root"] != (name in others)
    if manifest["record"]:
        model.depgraph_record = manifest["record"]
    return model
