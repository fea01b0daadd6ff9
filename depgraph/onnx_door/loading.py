"""From a path, or a model in memory, to an onnx_ir.Model that can be gone through; bad files in one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.external_data import set_base_dir
from onnx_ir.passes.common import InlinePass

from depgraph.errors import CaptureError, CheckpointError, DepgraphError
from depgraph.onnx_door.evaluating import bodies, place
from depgraph.onnx_door.examples import runtime_inputs
from depgraph.onnx_door.reading import read
from depgraph.onnx_door.skipping import name_sums
from depgraph.walks import reached

OLDEST = 7
UNDECLARED = "depgraph.undeclared"
"""Where a model notes its initializers that the file declares no shape of beside them."""


def load(given: str | os.PathLike[str] | ir.Model) -> tuple[ir.Model, str]:
    """The model and what to call it. Weights stay in the file (memory-mapped where they lie beside it).

    Functions of the model are written out where they are called, in a copy.

    Raises:
        CheckpointError: the file doesn't exist or can't be read, or data beside it is missing or too short.
        CaptureError: it is no ONNX file, or its graph is broken (a cycle, a value that nothing makes).
    """
    if isinstance(given, ir.Model):
        model, name = given, str(given.graph.name or "ONNX model")
    else:
        path = Path(given)
        model, name = _read(path), path.name
    if model.functions:
        model = model.clone()
        InlinePass()(model)
    if not len(model.graph) or not model.graph.outputs:
        raise CaptureError(f"{name} holds no operators: give a file that an exporter to ONNX wrote")
    check_order(model.graph, set(), name)
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is not None and version < OLDEST:
        raise CaptureError(
            f"{name} uses operator set {version}, from before {OLDEST}: convert it with onnx.version_converter"
        )
    _check_data(model, name)
    return name_sums(model), name


def _read(path: Path) -> ir.Model:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the name of an ONNX file")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if not path.stat().st_size:
        raise CaptureError(f"{path} is empty: give a whole ONNX file")
    try:
        proto, model = read(path)
    except DepgraphError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:
        raise CaptureError(
            f"{path} can't be read as an ONNX file ({type(error).__name__}): it is damaged, cut short or something else"
        ) from error
    for graph in model.graphs():
        set_base_dir(graph, path.parent)
    declared = {value.name for value in (*proto.graph.value_info, *proto.graph.input)}
    model.meta[UNDECLARED] = [name for name in model.graph.initializers if name not in declared]
    return model


def input_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the inputs that a file must be given; raises as `load` does."""
    return [str(value.name) for value in runtime_inputs(load(path)[0])]


def check_order(graph: ir.Graph, known: set[ir.Value], name: str) -> None:
    """Raise CaptureError where an operator reads what nothing has made before it."""
    known = {*known, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is None or value in known:
                continue
            made = value.producer()
            if made is None:
                raise CaptureError(
                    f"{name}: {place(node)} reads {value.name!r}, which nothing makes: the file is damaged"
                )
            order = "in a cycle" if made.graph is graph and _reaches(node, made) else "before it is made"
            raise CaptureError(f"{name}: {place(node)} reads {value.name!r} {order}: export the model again")
        for body in bodies(node):
            check_order(body, known, name)
        known.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            raise CaptureError(f"{name}: nothing makes the output {value.name!r}: the file is damaged")


def _reaches(start: ir.Node, goal: ir.Node) -> bool:
    """Does what one operator makes lead to the other?"""
    return goal in reached([start], lambda node: (user for output in node.outputs for user, _ in output.uses()))


def _check_data(model: ir.Model, name: str) -> None:
    """Raise CheckpointError where weights that lie beside the file aren't there as it says, CaptureError where sizes are off."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor: Any = value.const_value
            if tensor is None:
                raise CaptureError(f"{name}: the initializer {value.name!r} has no data: the file is damaged")
            if isinstance(tensor, ir.ExternalTensor):
                _check_external(tensor, str(value.name), name)
            elif isinstance(tensor, ir.TensorProtoTensor):
                _check_size(tensor, str(value.name), name)


def _check_external(tensor: ir.ExternalTensor, value: str, name: str) -> None:
    path = Path(tensor.path)
    if not path.is_file():
        raise CheckpointError(f"{name}: the data of {value!r} should lie in {path}, which doesn't exist: copy it there")
    need = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    if path.stat().st_size < need:
        raise CheckpointError(f"{name}: {path} ends before the data of {value!r} does: copy it again")
    if tensor.length is not None and tensor.length < tensor.nbytes:
        raise CaptureError(
            f"{name}: {value!r} of shape {tensor.shape} has {tensor.length} bytes of data, not {tensor.nbytes}"
        )


def _check_size(tensor: ir.TensorProtoTensor, value: str, name: str) -> None:
    raw = tensor.raw
    if raw.HasField("raw_data") and len(raw.raw_data) != tensor.nbytes:
        raise CaptureError(
            f"{name}: {value!r} of shape {tensor.shape} has {len(raw.raw_data)} bytes of data, not {tensor.nbytes}"
        )
