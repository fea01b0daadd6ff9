"""A module becomes an ONNX file that ONNX Runtime has been seen to run as PyTorch does."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from depgraph.capture.restoring import restored
from depgraph.cutting.record import in_short
from depgraph.dense import not_dense
from depgraph.errors import ExportError
from depgraph.finite import require_finite
from exporters import cases as check_cases
from exporters import onnx_check, onnx_file, ranges
from exporters.calls import Call, FlatModel, built_in, flatten_call, lowest_precision, output_names
from exporters.differences import TIES, traced_otherwise, with_first_of_equals
from exporters.dynamic import Dims, Specialised, enlarged, ladder
from exporters.model_state import preserved, without_cache
from exporters.onnx_program import Branches, Refused, Uncaptured, export_frozen, export_program, name_dims, rename_dims
from exporters.opsets import check_opset, check_reached
from exporters.rounding import ROUNDED, in_double_precision

_RECORDS: dict[str, Callable[[Any], Any]] = {"whole": lambda record: record, "costs": in_short}


@dataclass(frozen=True)
class OnnxOptions:
    """How to export.

    Attributes:
        opset: Version of the ONNX operator set, 18 or later (how late depends on the installed onnxscript).
        dtype: "as is", or "float32" to export a float32 copy (ONNX Runtime's CPU has few bfloat16 kernels).
        external_data: Put the weights into `<name>.data` beside the file; over 2 GB this is done anyway.
        rtol: Allowed error as a share of an output's largest magnitude; None: 1e-4, float16 1e-2, bfloat16 5e-2.
        atol: Allowed error on top of that; None: 1e-5, float16 1e-3, bfloat16 1e-2.
        constants: Inputs (by the names of the file's inputs) whose example values are built in, so that the file doesn't
            take them: image grids and other sizes given as tensors, by whose values the code branches.
        record: What the file says of how its model was pruned: "whole", or "costs", which leaves out what grows with what went.
    """

    opset: int = 20
    dtype: Literal["as is", "float32"] = "as is"
    external_data: bool = False
    rtol: float | None = None
    atol: float | None = None
    constants: tuple[str, ...] = ()
    record: Literal["whole", "costs"] = "whole"

    def __post_init__(self) -> None:
        for name, allowed in {"dtype": ("as is", "float32"), "record": tuple(_RECORDS)}.items():
            if getattr(self, name) not in allowed:
                raise ExportError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}.")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise ExportError(f"{name}={value!r} is no tolerance: give a number from 0, or None for the usual one.")
        if isinstance(self.constants, str):
            raise ExportError(f"constants={self.constants!r} is a single name: give a tuple of names.")


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how well it agrees with PyTorch.

    Attributes:
        bytes: Size on disk, external data included.
        max_abs_error: Largest absolute difference over all outputs and cases.
        max_rel_error: Largest difference of an output as a share of its largest magnitude.
        shapes_checked: The input shapes at which both were run; the first is the example's.
        dynamic: Input name -> dim -> name of the free size.
        notes: What the export had to do differently from what one would expect.
    """

    path: Path
    opset: int
    bytes: int
    max_abs_error: float
    max_rel_error: float
    shapes_checked: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        sizes = [(owner, dim, name) for owner, dims in self.dynamic.items() for dim, name in dims.items()]
        free = ", ".join(f"{owner}[{dim}] = {name}" for owner, dim, name in sizes)
        notes = "".join(f" Note: {note}." for note in self.notes)
        return (
            f"Wrote {self.path} ({_readable(self.bytes)}, opset {self.opset}) in {self.seconds:.1f} s. "
            f"Free sizes: {free or 'none'}. ONNX Runtime agrees with PyTorch to {self.max_abs_error:.2g} "
            f"({self.max_rel_error:.2g} of the largest output) at {len(self.shapes_checked)} sets of shapes: "
            f"{'; '.join(self.shapes_checked)}.{notes}"
        )


@dataclass
class _Job:
    """One export under way."""

    flat: FlatModel
    call: Call
    outputs: tuple[str, ...]
    draft: Path
    options: OnnxOptions
    record: Mapping[str, Any] | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Result:
    difference: onnx_check.Difference
    shapes: tuple[str, ...]
    dims: dict[str, dict[int, str]]


_DEFAULTS = OnnxOptions()


def to_onnx(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
    *,
    options: OnnxOptions = _DEFAULTS,
) -> OnnxReport:
    """Export `model` to ONNX and prove it: ONNX Runtime must agree with PyTorch, at shapes the export didn't see too.

    The model runs in eval mode meanwhile and is afterwards as it was. The file appears under its name only once the
    check has passed. It holds no local paths; its metadata has the library's version under `depgraph.version` and, for
    a pruned model (one with an attribute `depgraph_record`), what was pruned as JSON under `depgraph.pruned`.

    Args:
        args: Example inputs: a tuple, or one tensor. What is no tensor is built into the file as a constant.
        kwargs: Example inputs by name.
        dynamic: Which sizes stay free. None: dim 0 of every input as "batch", and dim 1 of two-dimensional integer
            or boolean inputs as "sequence"; if the model fixes those, fewer, and the report says so. A dict in the
            style of torch.export (`{"x": {0: "batch"}}`): exactly those, or an error. `STATIC` or `{}`: none.

    Raises:
        ExportError: The model can't be exported (it branches on values, say) or holds NaN or infinite weights, a free
            dim is fixed by the model's code, ONNX Runtime fails or differs beyond the tolerance, or the file can't be
            written. No file is left, one that was there stays.
    """
    started = time.perf_counter()
    check_opset(options.opset)
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"to_onnx takes a torch.nn.Module, not a {type(model).__name__}: give a module with a forward."
        )
    for found in not_dense(model):
        raise ExportError(f"{found[0].upper()}{found[1:]}, which can't be exported: give the model in dense form.")
    require_finite(model, ExportError)
    target = Path(path)
    record = _RECORDS[options.record](getattr(model, "depgraph_record", None))
    with onnx_file.staging(target) as draft:
        call = built_in(flatten_call(model, args, kwargs), options.constants)
        subject, call = _prepared(model, call, options)
        with restored(subject), preserved(subject), torch.no_grad():
            subject.eval()
            without_cache(subject)
            flat = FlatModel(subject, call)
            names, notes = output_names(flat, call)
            notes = notes if subject is model else [*notes, _widened(model)]
            job = _Job(flat, call, names, draft, options, record, notes)
            result = _climb_down(job, dynamic)
        size = onnx_file.publish(draft, target)
    return OnnxReport(
        target,
        options.opset,
        size,
        result.difference.absolute,
        result.difference.relative,
        result.shapes,
        result.dims,
        tuple(job.notes),
        time.perf_counter() - started,
    )


def _prepared(model: nn.Module, call: Call, options: OnnxOptions) -> tuple[nn.Module, Call]:
    """The model and call themselves, or a float32 copy if that is asked for and makes a difference."""
    tensors = [*model.parameters(), *model.buffers(), *call.tensors]
    if any(t.is_meta for t in tensors):
        raise ExportError(f"{type(model).__name__} has weights on the meta device: there is nothing to write; load it.")
    if options.dtype == "as is" or all(t.dtype == torch.float32 for t in tensors if t.is_floating_point()):
        return model, call
    return copy.deepcopy(model).float(), call.as_float32()


def _widened(model: nn.Module) -> str:
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} - {torch.float32}
    was = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "other numbers"
    return f"what is {was} in the model is float32 in the file; exporters.quantise makes a smaller one of it"


def _climb_down(job: _Job, dynamic: Any) -> _Result:
    """Export with the most free dims that work: only the default may end with fewer than it asks."""
    rungs = ladder(job.call, dynamic)
    for rung, following in zip(rungs, (*rungs[1:], None), strict=True):
        try:
            return _export_and_check(job, rung.dims)
        except Branches as error:
            if dynamic:
                raise
            return _export_at_example(job, error)
        except (Refused, Specialised) as error:
            if following is None and not dynamic and isinstance(error, Uncaptured):
                return _export_at_example(job, error)
            if following is None:
                raise
            job.notes.append(f"{rung.label} can't stay free, {following.label} tried instead: {error}".rstrip("."))
    raise AssertionError("a ladder has at least one rung")


def _export_at_example(job: _Job, failure: ExportError) -> _Result:
    """Export a model that torch.export can't capture, where none of its inputs decides anything at these sizes."""
    try:
        program, note = export_frozen(job.flat, job.call, job.options.opset)
    except ExportError:
        raise
    except Exception as error:
        raise failure from error
    job.notes.append(note)
    subject = check_cases.Subject(job.flat, job.call.names, job.outputs, job.call.tensors, {})
    return _checked(job, program, job.call.tensors, {}, check_cases.other_values(subject))


def _export_and_check(job: _Job, dims: Dims) -> _Result:
    examples = enlarged(job.call, dims)
    program, switched = export_program(job.flat, job.call, examples, dims, job.options.opset)
    result = _checked(job, program, examples, dims)
    job.notes.extend(switched)
    return result


def _checked(
    job: _Job,
    program: torch.onnx.ONNXProgram,
    examples: tuple[Tensor, ...],
    dims: Dims,
    further: Sequence[check_cases.Case] = (),
) -> _Result:
    check_reached(program, job.options.opset)
    names = name_dims(program, job.call, dims)
    onnx_file.set_names(program.model, job.call.names, job.outputs, getattr(job.flat.model, "weight_prefix", "model."))
    onnx_file.sign(program.model, job.record)
    subject = check_cases.Subject(job.flat, job.call.names, job.outputs, examples, names)
    names = rename_dims(program, names, check_cases.inseparable(subject))
    subject = replace(subject, dims=names)
    unseen, unproved = check_cases.unseen_cases(subject)
    if unproved:
        raise Refused(
            f"{type(job.flat.model).__name__} runs at no other size of {', '.join(unproved)} than the example's; "
            "leave it out of `dynamic`, or make the model accept other sizes."
        )
    limits = ranges.ranges_of(program, subject)
    example = check_cases.example_case(job.flat, _example(job.call, examples, names))
    cases = [example, *unseen, *further, *ranges.cases_beyond(subject, limits)]
    onnx_file.write(program.model, job.draft, external_data=job.options.external_data)
    tolerance = onnx_check.tolerance_for(lowest_precision(job.flat, job.call), job.options.rtol, job.options.atol)
    within, beyond = ranges.apart(subject, limits, cases)
    difference = _difference(job, program, subject, within, tolerance)
    try:
        difference |= _difference(job, program, subject, beyond, tolerance) if beyond else onnx_check.Difference()
    except onnx_check.Differs as error:
        raise Refused(
            f"The code of {type(job.flat.model).__name__} asks for a size, and what was captured holds for {ranges.said(limits)} "
            "only; leave that out of `dynamic`, or let the code compute the same at all sizes."
        ) from error
    return _Result(difference, check_cases.describe_cases(cases, job.call.names), names)


def _difference(
    job: _Job,
    program: torch.onnx.ONNXProgram,
    subject: check_cases.Subject,
    cases: list[check_cases.Case],
    tolerance: onnx_check.Tolerance,
) -> onnx_check.Difference:
    """The largest difference from PyTorch; where that is free to choose among equal values, from the choice that ONNX makes."""
    try:
        return onnx_check.check_file(job.draft, subject, cases, tolerance)
    except onnx_check.Differs as error:
        failure = error
    settled = with_first_of_equals(job.flat, cases)
    if settled is None and (found := _in_double(job, subject, cases, tolerance)) is not None:
        return found
    if settled is not None:
        try:
            difference = onnx_check.check_file(job.draft, subject, settled, tolerance)
        except onnx_check.Differs as error:
            failure = error
        else:
            job.notes.append(TIES)
            return difference
    raise (traced_otherwise(program, subject, cases, tolerance) or failure) from None


def _in_double(
    job: _Job, subject: check_cases.Subject, cases: list[check_cases.Case], tolerance: onnx_check.Tolerance
) -> onnx_check.Difference | None:
    """The largest difference from what the model computes in double precision; None where that is more than rounding makes."""
    doubled = in_double_precision(job.flat, cases)
    if doubled is None:
        return None
    try:
        difference = onnx_check.check_file(job.draft, subject, doubled[0], tolerance)
    except onnx_check.Differs:
        return None
    job.notes.append(ROUNDED.format(doubled[1]))
    return difference


def _example(call: Call, enlarged: tuple[Tensor, ...], names: check_cases.NamedDims) -> tuple[Tensor, ...]:
    """The caller's own tensors, unless two of them have different sizes under one name (1 beside another size)."""
    sizes: dict[str, set[int]] = {}
    for owner, tensor in zip(call.names, call.tensors, strict=True):
        for dim, name in names.get(owner, {}).items():
            sizes.setdefault(name, set()).add(tensor.shape[dim])
    return call.tensors if all(len(found) == 1 for found in sizes.values()) else enlarged


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
