"""torch's ONNX exporter, with its failures told in one sentence and the free sizes given their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterator
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from depgraph.capture.deciding import DRAWS
from depgraph.capture.frozen import frozen
from depgraph.capture.validating import unvalidated
from depgraph.errors import ExportError, first_line
from exporters import translations
from exporters.bounds import bounds_of_one_type
from exporters.calls import Call, FlatModel
from exporters.cases import NamedDims
from exporters.dynamic import Dims, fixed_dims, for_torch, settled_names, specialised
from exporters.model_state import alternatives, one_by_one, preserved
from exporters.no_ops import exact_no_ops
from exporters.quietly import quietly
from exporters.transforms import transforms_ended


class Refused(ExportError):
    """The model can't be exported, or not be run, with these sizes free; with fewer it may."""


class Uncaptured(Refused):
    """torch.export can't capture the model, or what it captured can't be run by itself."""


class Branches(ExportError):
    """The way through the model's code depends on the values of tensors.

    `constants` are the inputs that, built into the file, would settle it; empty where that is no way out, or not known.
    """

    def __init__(self, message: str, constants: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.constants = constants


def export_program(
    flat: FlatModel, call: Call, examples: tuple[Tensor, ...], dims: Dims, opset: int
) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """The program of the model as it is, else on the alternatives that transformers offers; and notes about those.

    Raises:
        Specialised: A size that was to stay free is a constant of the model's code.
        Refused: torch can't export the model.
        Branches: Its control flow depends on values.
    """
    switched: list[str] = []
    with preserved(flat.model):
        attempts = alternatives(flat.model)
        while True:
            flat.restart()
            try:
                return _export(flat, type(flat.model).__name__, call, examples, dims, opset), switched
            except (Refused, Branches) as error:
                switched.append(_next_way(flat.model, attempts, error))


def _next_way(model: nn.Module, attempts: Iterator[str], error: Refused | Branches) -> str:
    """Switch a model to the next alternative and say so; raises the error where there is none, or none could help."""
    may = isinstance(error, Refused) or one_by_one(model)
    note = next(attempts, None) if may else None
    if note is None:
        raise error
    return note


def export_frozen(flat: FlatModel, call: Call, opset: int) -> tuple[torch.onnx.ONNXProgram, str]:
    """The program of a model that branches on values, at the example's sizes, and a note; it holds for all values of its inputs.

    Raises:
        Branches: It would hold for some values of an input only.
        Refused: torch can't export it.
    """
    owner = type(flat.model).__name__
    with preserved(flat.model):
        found = frozen(flat, call.tensors, {})
    if DRAWS in found.inputs:
        raise Branches(f"{owner} decides by random numbers{found.places}, which a graph can't repeat.")
    if found.inputs:
        raise _branches(owner, [call.names[i] for i in found.inputs], call, found.places)
    why = f"the code depends on values{found.places}" if found.places else "torch.export can't capture the model"
    note = f"the example's sizes are built into the file, as {why}"
    return _export(found.module, owner, call, call.tensors, {}, opset), note


def _branches(owner: str, names: list[str], call: Call, places: str) -> Branches:
    said = f"{owner} branches on the values of {', '.join(map(repr, names))}{places}, which a graph can't; use torch.where "
    numbers = all(not t.is_floating_point() for n, t in zip(call.names, call.tensors, strict=True) if n in names)
    if not numbers or len(names) == len(call.names):
        return Branches(f"{said}or torch.cond there.")
    way = f"or build the example's values into the file with options=OnnxOptions(constants={tuple(names)!r})"
    return Branches(f"{said}or torch.cond there, {way}.", tuple(names))


def _export(
    module: nn.Module, owner: str, call: Call, examples: tuple[Tensor, ...], dims: Dims, opset: int
) -> torch.onnx.ONNXProgram:
    shapes = for_torch(call, dims)
    # torch leaves marks on those that it fails with, and reads them the next time
    examples = tuple(t.detach() for t in examples)
    try:
        with quietly(), unvalidated(), exact_no_ops(), bounds_of_one_type(), transforms_ended():
            program = torch.onnx.export(
                module.eval(),
                examples,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=shapes,
                custom_translation_table=translations.table(opset),
            )
    except Exception as error:
        raise (specialised(error, call, dims) or _failure(owner, error)) from error
    if program is None:
        raise Refused("torch.onnx.export returned nothing; use a torch whose exporter has dynamo=True.")
    _list_constants(program.model.graph)
    return program


def _list_constants(graph: onnx_ir.Graph) -> None:
    """Add constants that nodes take and the graph's list lacks: the exporter loses those that its rules give the same name."""
    taken = dict.fromkeys(value for node in graph.all_nodes() for value in node.inputs if value is not None)
    for value in taken:
        made = value.producer() is not None or value.const_value is None
        if not made and graph.initializers.get(value.name or "") is not value:
            value.name = _unused(value.name, graph.initializers)
            graph.register_initializer(value)


def _unused(name: str | None, taken: Container[str]) -> str:
    """A name that begins with `name` and isn't taken."""
    numbered = (f"{name}_{k}" for k in itertools.count(1))
    return next(one for one in itertools.chain([name or "constant"], numbered) if one not in taken)


_NODE = re.compile(r"call_function\[target=(?:torch\.ops\.)?([\w.]+)\]")


def _failure(owner: str, error: Exception) -> ExportError:
    """What torch's exporter says, with the place in the model's code where it gives one."""
    cause = error.__cause__ or error
    places = re.findall(r'File "([^"]+)", line (\d+)', str(cause))
    where = f" at {places[-1][0]}, line {places[-1][1]}" if places else ""
    if "data-dependent" in str(cause):
        return Branches(
            f"{owner} branches on a tensor's values{where}, which a graph can't; use torch.where or torch.cond there."
        )
    captured = type(error).__name__ != "TorchExportError" and "decompose" not in first_line(error)
    kind = Refused if captured else Uncaptured
    if node := _NODE.search(f"{first_line(cause)} {first_line(error)}"):
        return kind(
            f"torch.onnx.export has no translation of this use of {node[1]} in {owner}{where}; write it with other operators "
            "of torch there."
        )
    return kind(f"torch.onnx.export can't export {owner}{where}: {first_line(cause)}.")


def name_dims(program: torch.onnx.ONNXProgram, call: Call, dims: Dims) -> dict[str, dict[int, str]]:
    """Give the graph's free sizes their names: input -> dim -> name.

    Raises:
        Specialised: A size that was to stay free came out fixed.
    """
    sizes: dict[tuple[str, int], Any] = {}
    for owner, value in zip(call.names, program.model.graph.inputs, strict=True):
        for dim in dims.get(owner, {}):
            sizes[owner, dim] = value.shape[dim] if value.shape is not None else None
    fixed = {place for place, size in sizes.items() if isinstance(size, int) and _insists(dims[place[0]][place[1]])}
    if fixed:
        raise fixed_dims(fixed, dims)
    symbols = {place: str(size.value) for place, size in sizes.items() if not isinstance(size, int)}
    names = settled_names(dims, symbols)
    program.rename_axes({symbol: names[place] for place, symbol in symbols.items()})
    settled: dict[str, dict[int, str]] = {}
    for (owner, dim), name in names.items():
        settled.setdefault(owner, {})[dim] = name
    return settled


def rename_dims(program: torch.onnx.ONNXProgram, dims: NamedDims, new: dict[str, str]) -> dict[str, dict[int, str]]:
    """`dims` with names replaced by `new` ones, in the program too."""
    renames: dict[Any, str] = {**new}
    if renames:
        program.rename_axes(renames)
    return {owner: {dim: new.get(name, name) for dim, name in axes.items()} for owner, axes in dims.items()}


def _insists(value: Any) -> bool:
    """Whether a request for a free size is more than torch.export's "as it comes" (`Dim.AUTO`)."""
    return bool(value != torch.export.Dim.AUTO)
