"""The proof: ONNX Runtime against PyTorch, case by case, within a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from depgraph.errors import ExportError, first_line
from exporters.cases import Case, Subject
from exporters.onnx_program import Refused

_DEFAULT_TOLERANCES = {torch.float16: (1e-2, 1e-3), torch.bfloat16: (5e-2, 1e-2)}


class Differs(ExportError):
    """ONNX Runtime computes something else than PyTorch."""


@dataclass(frozen=True)
class Tolerance:
    """The error may be `absolute + relative * largest magnitude of the output`."""

    relative: float = 1e-4
    absolute: float = 1e-5


def tolerance_for(dtype: torch.dtype, relative: float | None, absolute: float | None) -> Tolerance:
    """The caller's tolerances, else those that suit the dtype."""
    usual = Tolerance(*_DEFAULT_TOLERANCES.get(dtype, (1e-4, 1e-5)))
    return Tolerance(usual.relative if relative is None else relative, usual.absolute if absolute is None else absolute)


@dataclass(frozen=True)
class Difference:
    """The largest absolute error, and the largest error over the output's largest magnitude."""

    absolute: float = 0.0
    relative: float = 0.0

    def __or__(self, other: Difference) -> Difference:
        return Difference(max(self.absolute, other.absolute), max(self.relative, other.relative))


def open_session(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Raises:
        ExportError: ONNX Runtime can't load the file or has no kernel for one of its operators.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime can't load {path.name} ({first_line(error)}); "
            'if its dtype has no CPU kernels, export with options=OnnxOptions(dtype="float32").'
        ) from error


def check_file(path: Path, subject: Subject, cases: Sequence[Case], tolerance: Tolerance) -> Difference:
    """Run the file on every case and return the largest difference.

    Raises:
        Refused: ONNX Runtime fails.
        Differs: It gives something else than PyTorch, by more than the tolerance.
    """
    session = open_session(path, torch.get_num_threads())
    worst = Difference()
    for case in cases:
        actual = _run_onnx(session, subject, case)
        allowed = [replace(tolerance, absolute=tolerance.absolute + more) for more in case.rounding]
        for k, (name, expected, got) in enumerate(zip(subject.outputs, case.expected, actual, strict=True)):
            worst |= compare(f"{name!r} at {case.label}", expected, got, allowed[k] if allowed else tolerance)
    return worst


def _run_onnx(session: onnxruntime.InferenceSession, subject: Subject, case: Case) -> list[np.ndarray]:
    feeds = {name: tensor.detach().cpu().numpy() for name, tensor in zip(subject.inputs, case.inputs, strict=True)}
    try:
        return session.run(list(subject.outputs), feeds)
    except Exception as error:
        raise Refused(
            f"ONNX Runtime fails at {case.label}, where PyTorch doesn't ({first_line(error)}); "
            "nothing was written: leave that dim out of `dynamic`."
        ) from error


def compare(
    place: str, expected: Tensor, actual: np.ndarray, tolerance: Tolerance, runtime: str = "ONNX Runtime"
) -> Difference:
    """The difference of one output, within the tolerance; `runtime` says in errors what made `actual`.

    Integers and booleans must be equal, and so must what isn't finite.

    Raises:
        Differs: Shapes or values differ.
    """
    reference = expected.to(torch.float64).numpy()
    got = np.asarray(actual, dtype=np.float64)
    if reference.shape != got.shape:
        raise Differs(f"At {place} {runtime} gives shape {got.shape}, PyTorch {reference.shape}; not written.")
    finite = np.isfinite(reference)
    if not (np.array_equal(reference[~finite], got[~finite], equal_nan=True) and np.isfinite(got[finite]).all()):
        raise Differs(f"At {place} {runtime} and PyTorch have NaN or infinity in different places; not written.")
    error = float(np.abs(reference[finite] - got[finite]).max(initial=0.0))
    largest = float(np.abs(reference[finite]).max(initial=0.0))
    allowed = tolerance.absolute + tolerance.relative * largest if expected.is_floating_point() else 0.0
    if error > allowed:
        raise Differs(
            f"At {place} {runtime} and PyTorch differ by {error:.3g}, where {allowed:.3g} is allowed (largest value "
            f"{largest:.3g}); not written: export in float32, or raise `rtol` in the options if that is rounding."
        )
    return Difference(error, error / largest if largest else 0.0)
