"""The file itself: names, metadata, nothing of the machine it was made on; written aside, then moved into place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from depgraph import interruption
from depgraph.errors import ExportError

INLINE_LIMIT = 2_000_000_000
"""Bytes of weights that still go into the file itself (protobuf ends at 2 GiB, the graph included)."""

VERSION_KEY = "depgraph.version"
RECORD_KEY = "depgraph.pruned"


def library_version() -> str:
    """The installed version of this library ("unknown" when run from a source tree that isn't installed)."""
    try:
        return metadata.version("depgraph")
    except metadata.PackageNotFoundError:
        return "unknown"


def set_names(model: onnx_ir.Model, inputs: Sequence[str], outputs: Sequence[str], prefix: str) -> None:
    """Name the graph's inputs and outputs, and take `prefix` off the weights' names."""
    graph = model.graph
    values = list(_values(model))
    taken = {value.name for value in values} | {*inputs, *outputs}
    for value in values:
        if value.name in inputs or value.name in outputs:
            value.name = _fresh(str(value.name), taken)
    for values_of, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values_of, names, strict=True):
            value.name = name
    for value in list(graph.initializers.values()):
        short = str(value.name).removeprefix(prefix)
        if short not in taken:
            taken.add(short)
            value.name = short


def _fresh(name: str, taken: set[str | None]) -> str:
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


def _values(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def sign(model: onnx_ir.Model, record: Mapping[str, Any] | None) -> None:
    """Remove stack traces, paths and the exporter's notes; say who made the file and what was pruned.

    Raises:
        ExportError: `record` can't be written as JSON.
    """
    ClearMetadataAndDocStringPass()(model)
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
    model.producer_name = "depgraph"
    model.producer_version = library_version()
    model.metadata_props[VERSION_KEY] = library_version()
    if record is None:
        return
    try:
        model.metadata_props[RECORD_KEY] = json.dumps(record, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ExportError(f"The model's `depgraph_record` is no JSON ({error}); remove it or mend it.") from error


def data_path(path: Path) -> Path:
    """Where the weights of `path` lie when they don't lie in it."""
    return path.with_name(path.name + ".data")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A path with the target's name in a temporary folder beside it, gone on leaving, with all in it.

    The name is the final one, so that the location of external data in the file is right after the move.

    Raises:
        ExportError: The folder doesn't exist or can't be written to, or the target is a folder.
    """
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the name of a file, such as {target / 'model.onnx'}.")
    if not target.parent.is_dir():
        raise ExportError(f"The folder {target.parent} for {target.name} doesn't exist; make it first.")
    with writing(target):
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an OSError into a sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(
            f"{target} could not be written ({reason}); free some space or choose a folder that can be written to."
        ) from error


def write(model: onnx_ir.Model, draft: Path, *, external_data: bool) -> None:
    """Save the model as `draft`, its weights beside it if asked or if there are over `INLINE_LIMIT` bytes of them."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    aside = data_path(draft).name if external_data or size > INLINE_LIMIT else None
    with writing(draft.parent.parent / draft.name):
        onnx_ir.save(model, draft, external_data=aside)


def publish(draft: Path, target: Path) -> int:
    """Move the draft (and its data) into place and return the bytes it takes; a failure leaves things as they were."""
    data, old_data, aside = data_path(draft), data_path(target), draft.with_name("before.data")
    has_data = data.exists()
    size = draft.stat().st_size + (data.stat().st_size if has_data else 0)
    interruption.check()
    with writing(target):
        try:
            if has_data and old_data.exists():
                os.replace(old_data, aside)
            if has_data:
                os.replace(data, old_data)
            os.replace(draft, target)
        except BaseException:
            if aside.exists():
                aside.rename(old_data)
            elif has_data and not data.exists():
                old_data.unlink(missing_ok=True)
            raise
    return size
