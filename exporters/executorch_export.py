"""A module becomes an ExecuTorch file (.pte) that its runtime has been seen to run as PyTorch does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph.capture.validating import unvalidated
from depgraph.errors import ExportError, first_line
from exporters.calls import Call, FlatModel, built_in, flatten_call, lowest_precision, output_names
from exporters.cases import Case, Subject, describe_cases, example_case, sized_case
from exporters.dynamic import STATIC, Dims, explicit_dims
from exporters.extras import required
from exporters.model_state import alternatives
from exporters.onnx_check import tolerance_for
from exporters.onnx_file import staging, writing
from exporters.quietly import quietly
from exporters.verifying import FileReport, Run, check_exportable, difference, named_file, on_cpu, published, still


@dataclass(frozen=True)
class ExecuTorchOptions:
    """How to export.

    Attributes:
        rtol: Allowed error as a share of an output's largest magnitude; None: 1e-4, float16 1e-2, bfloat16 5e-2.
        atol: Allowed error on top of that; None: 1e-5, float16 1e-3, bfloat16 1e-2.
        constants: Inputs whose example values are built in, see `OnnxOptions.constants`.
    """

    rtol: float | None = None
    atol: float | None = None
    constants: tuple[str, ...] = ()


_DEFAULTS = ExecuTorchOptions()


def to_executorch(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = STATIC,
    *,
    options: ExecuTorchOptions = _DEFAULTS,
) -> FileReport:
    """Export `model` to ExecuTorch and prove it: its runtime must agree with PyTorch, at the bounds of every free size too.

    What XNNPACK has kernels for is delegated to it, the rest runs on ExecuTorch's portable ones. The file's one method is
    "forward"; it takes the tensors of the call, and gives those of the output, in order.

    Args:
        args: Example inputs: a tuple, or one tensor. What is no tensor is built into the file as a constant.
        path: The file, which ends in .pte, or a folder, for "model.pte" in it.
        dynamic: Which sizes stay free; none by default. The runtime plans its memory ahead, so each needs a largest size:
            `{"x": {0: torch.export.Dim("batch", min=1, max=8)}}`.

    Raises:
        ExportError: ExecuTorch isn't installed, the model can't be exported (it branches on values, say), a free size has
            no largest one or is fixed by the model's code, or the runtime fails or differs beyond the tolerance. No file is
            left, one that was there stays.
    """
    with quietly():
        exir = required("executorch", "executorch.exir", "executorch.runtime")
    check_exportable(model, "to_executorch")
    model, (args, kwargs) = on_cpu(model, (args, kwargs))
    target = named_file(path, ".pte", "model.pte")
    with staging(target) as draft, still(model):
        call = built_in(flatten_call(model, args, kwargs), options.constants)
        dims = _bounded(explicit_dims(call, dynamic))
        flat = FlatModel(model, call)
        names, notes = output_names(flat, call)
        program, switched = _captured(flat, call, dims)
        shared_out = _write(exir, program, draft)
        subject = Subject(flat, call.names, names, call.tensors, _names(dims))
        cases = [example_case(flat, call.tensors), *_at_bounds(subject, dims)]
        tolerance = tolerance_for(lowest_precision(flat, call), options.rtol, options.atol)
        with quietly():
            found = difference(_runner(draft), names, cases, tolerance, "ExecuTorch")
        size = published({draft: target})
    return FileReport(
        (target,),
        "ExecuTorch for XNNPACK",
        f"ExecuTorch {metadata.version('executorch')}",
        size,
        found.absolute,
        found.relative,
        describe_cases(cases, call.names),
        (*notes, *switched, shared_out),
    )


def _bounded(dims: Dims) -> Dims:
    """The same, if every free size has a largest one."""
    for owner, axes in dims.items():
        for dim, size in axes.items():
            if not isinstance(getattr(size, "max", None), int):
                raise ExportError(
                    f"Dim {dim} of {owner!r} is to be free, but ExecuTorch plans its memory for a largest size: give "
                    f'dynamic={{"{owner}": {{{dim}: torch.export.Dim("{size}", max=...)}}}}.'
                )
    return dims


def _names(dims: Dims) -> dict[str, dict[int, str]]:
    return {owner: {dim: str(size.__name__) for dim, size in axes.items()} for owner, axes in dims.items()}


def _at_bounds(subject: Subject, dims: Dims) -> list[Case]:
    """A case with the smallest sizes and one with the largest.

    Raises ExportError where PyTorch itself doesn't run at these.
    """
    cases = []
    for bound in ("min", "max") if dims else ():
        sizes = {str(s.__name__): getattr(s, bound) for axes in dims.values() for s in axes.values()}
        case = sized_case(subject, sizes)
        if case is None:
            raise ExportError(
                f"{type(subject.flat.model).__name__} doesn't run at {', '.join(f'{n}={s}' for n, s in sizes.items())}, the "
                f"{bound} of `dynamic`: give other bounds."
            )
        cases.append(case)
    return cases


def _captured(flat: FlatModel, call: Call, dims: Dims) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The model as torch.export captures it, else on the alternatives that transformers offers, which notes say."""
    owner, switched = type(flat.model).__name__, list[str]()
    shapes = (tuple(dims.get(name) for name in call.names),) if dims else None
    attempts = alternatives(flat.model)
    while True:
        try:
            with unvalidated():
                return torch.export.export(flat, call.tensors, dynamic_shapes=shapes), switched
        except Exception as error:
            note = next(attempts, None)
            if note is None:
                raise ExportError(
                    f"torch.export can't capture {owner} ({first_line(error)}); mend its code there, or leave out `dynamic`."
                ) from error
            switched.append(note)


def _write(exir: Any, program: torch.export.ExportedProgram, draft: Path) -> str:
    """Write the file, and say how much of it XNNPACK runs."""
    partitioners = required("executorch", "executorch.backends.xnnpack.partition.xnnpack_partitioner")
    try:
        with quietly():
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioners.XnnpackPartitioner()])
            made = lowered.to_executorch()
    except Exception as error:
        raise ExportError(
            f"ExecuTorch can't hold the model ({first_line(error)}); export it with to_onnx, or write that part with other "
            "operators."
        ) from error
    with writing(draft.parent.parent / draft.name), draft.open("wb") as file:
        made.write_to_file(file)
    calls = [str(node.target) for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    parts = sum("executorch_call_delegate" in call for call in calls)
    rest = sum("executorch_call_delegate" not in call and "getitem" not in call for call in calls)
    return f"XNNPACK runs {parts} parts of the graph, portable kernels the {rest} operators between"


def _runner(draft: Path) -> Run:
    runtime = required("executorch", "executorch.runtime").Runtime.get()
    try:
        program = runtime.load_program(draft)
        loaded = program, program.load_method("forward")
    except Exception as error:
        raise ExportError(f"ExecuTorch can't load what it wrote ({first_line(error)}); not written.") from error

    def run(inputs: Sequence[Tensor]) -> list[np.ndarray]:
        return [made.clone().numpy() for made in loaded[1].execute(inputs)]

    return run
