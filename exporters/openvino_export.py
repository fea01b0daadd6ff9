"""A module becomes an OpenVINO file (.xml with its .bin) that OpenVINO has been seen to run as PyTorch does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from depgraph.errors import ExportError, first_line
from exporters import cases as check_cases
from exporters.calls import FlatModel, built_in, flatten_call, lowest_precision, output_names
from exporters.differences import TIES, with_first_of_equals
from exporters.dynamic import enlarged
from exporters.extras import required
from exporters.onnx_check import Difference, Differs, Tolerance, tolerance_for
from exporters.onnx_export import OnnxOptions, to_onnx
from exporters.onnx_file import staging
from exporters.verifying import FileReport, Run, difference, named_file, published, still


@dataclass(frozen=True)
class OpenVinoOptions:
    """How to export.

    Attributes:
        weights: How they are stored: "as is", or "float16", which halves the file; OpenVINO computes in float32 all the same.
        rtol: Allowed error as a share of an output's largest magnitude; None: 1e-4, or 1e-2 with weights in float16.
        atol: Allowed error on top of that; None: 1e-5, or 1e-3 with weights in float16.
        constants: Inputs whose example values are built in, see `OnnxOptions.constants`.
    """

    weights: Literal["as is", "float16"] = "as is"
    rtol: float | None = None
    atol: float | None = None
    constants: tuple[str, ...] = ()


_DEFAULTS = OpenVinoOptions()


def to_openvino(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
    *,
    options: OpenVinoOptions = _DEFAULTS,
) -> FileReport:
    """Export `model` to OpenVINO and prove it: OpenVINO must agree with PyTorch, at shapes the export didn't see too.

    The way is through an ONNX file, itself checked, so inputs and outputs have the names that `to_onnx` gives them, and
    `dynamic` means the same. The check runs on the CPU with float32 as inference precision; by default OpenVINO may compute
    in a lower one where the device has it.

    Args:
        args: Example inputs: a tuple, or one tensor.
        path: The file, which ends in .xml, or a folder, for "model.xml" in it. The weights lie beside it, in a .bin.

    Raises:
        ExportError: OpenVINO isn't installed, the model can't be exported, or OpenVINO fails on it or differs beyond the
            tolerance. No file is left, one that was there stays.
    """
    openvino = required("openvino", "openvino")
    if options.weights not in ("as is", "float16"):
        raise ExportError(f"weights={options.weights!r} is not one of 'as is', 'float16'.")
    target = named_file(path, ".xml", "model.xml")
    with staging(target) as draft:
        between = draft.with_suffix(".onnx")
        onnx = to_onnx(model, args, between, kwargs, dynamic, options=_onnx_options(options))
        _convert(openvino, between, draft, options)
        with still(model):
            call = built_in(flatten_call(model, args, kwargs), options.constants)
            flat = FlatModel(model, call)
            names, _ = output_names(flat, call)
            examples = enlarged(call, onnx.dynamic)
            subject = check_cases.Subject(flat, call.names, names, examples, onnx.dynamic)
            unseen, _ = check_cases.unseen_cases(subject)
            cases = [check_cases.example_case(flat, examples), *unseen]
            precision = torch.float16 if options.weights == "float16" else lowest_precision(flat, call)
            tolerance = tolerance_for(precision, options.rtol, options.atol)
            run = _runner(openvino, draft, subject)
            found, notes = _difference(run, subject, cases, tolerance)
        weights = draft.with_suffix(".bin")
        size = published({weights: target.with_suffix(".bin"), draft: target})
    return FileReport(
        (target, target.with_suffix(".bin")),
        "OpenVINO",
        f"OpenVINO {openvino.__version__.split('-')[0]}",
        size,
        found.absolute,
        found.relative,
        check_cases.describe_cases(cases, call.names),
        (*onnx.notes, *notes),
    )


def _onnx_options(options: OpenVinoOptions) -> OnnxOptions:
    """For the file in between: the looser of the two checks is the caller's."""
    return OnnxOptions(rtol=options.rtol, atol=options.atol, constants=options.constants)


def _convert(openvino: Any, between: Path, draft: Path, options: OpenVinoOptions) -> None:
    """Convert the ONNX file, whose metadata go into the file's `rt_info`, under "framework"."""
    try:
        converted = openvino.convert_model(between)
        openvino.save_model(converted, draft, compress_to_fp16=options.weights == "float16")
    except Exception as error:
        raise ExportError(
            f"OpenVINO can't convert the model ({first_line(error)}); export it with to_onnx, or write that part with "
            "other operators."
        ) from error


def _runner(openvino: Any, draft: Path, subject: check_cases.Subject) -> Run:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        compiled = openvino.Core().compile_model(draft, "CPU", settings)
        places = [compiled.output(name) for name in subject.outputs]
    except Exception as error:
        raise ExportError(f"OpenVINO can't load what it converted ({first_line(error)}); not written.") from error

    def run(inputs: Sequence[Tensor]) -> list[np.ndarray]:
        made = compiled({name: t.numpy() for name, t in zip(subject.inputs, inputs, strict=True)})
        return [made[place] for place in places]

    return run


def _difference(
    run: Run, subject: check_cases.Subject, cases: Sequence[check_cases.Case], tolerance: Tolerance
) -> tuple[Difference, tuple[str, ...]]:
    """The largest difference from PyTorch, or from PyTorch choosing the first of equal values, which a note then says."""
    try:
        return difference(run, subject.outputs, cases, tolerance, "OpenVINO"), ()
    except Differs:
        settled = with_first_of_equals(subject.flat, cases)
        if settled is None:
            raise
    return difference(run, subject.outputs, settled, tolerance, "OpenVINO"), (TIES,)
