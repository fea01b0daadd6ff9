"""What exports beside ONNX share: the model made ready, and its file run in the file's own runtime against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph import interruption
from depgraph.capture.restoring import restored
from depgraph.dense import not_dense
from depgraph.errors import ExportError, first_line
from depgraph.finite import require_finite
from exporters.cases import Case
from exporters.model_state import preserved, without_cache
from exporters.onnx_check import Difference, Tolerance, compare
from exporters.onnx_file import writing

Run = Callable[[Sequence[Tensor]], Sequence[np.ndarray]]
"""Outputs of a file, in the order of the model's, for inputs in the order of the call's."""


@dataclass(frozen=True)
class FileReport:
    """What was written and how well it agrees with PyTorch.

    Attributes:
        files: All files of the export, the one to open first.
        format: What to call the format in a sentence.
        runtime: What ran the file, with its version.
        bytes: Size on disk of all files.
        max_abs_error: Largest absolute difference over all outputs and cases.
        max_rel_error: Largest difference of an output as a share of its largest magnitude.
        shapes_checked: The input shapes at which both were run.
        notes: What the export had to do differently from what one would expect.
    """

    files: tuple[Path, ...]
    format: str
    runtime: str
    bytes: int
    max_abs_error: float
    max_rel_error: float
    shapes_checked: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file to open."""
        return self.files[0]

    def __str__(self) -> str:
        notes = "".join(f" Note: {note}." for note in self.notes)
        return (
            f"Wrote {self.path} ({self.format}, {self.bytes:,} bytes). {self.runtime} agrees with PyTorch to "
            f"{self.max_abs_error:.2g} ({self.max_rel_error:.2g} of the largest output) at {len(self.shapes_checked)} sets "
            f"of shapes: {'; '.join(self.shapes_checked)}.{notes}"
        )


def check_exportable(model: nn.Module, door: str) -> None:
    """Raise ExportError for what is no module, or has weights that aren't there, dense and finite."""
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"{door} takes a torch.nn.Module, not a {type(model).__name__}: give a module with a forward."
        )
    for found in not_dense(model):
        raise ExportError(f"{found[0].upper()}{found[1:]}, which can't be exported: give the model in dense form.")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ExportError(f"{type(model).__name__} has weights on the meta device: there is nothing to write; load it.")
    require_finite(model, ExportError)


def on_cpu(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """The model and its example inputs, or copies of them in the CPU's memory."""
    if all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers())):
        return model, inputs
    return copy.deepcopy(model).cpu(), pytree.tree_map_only(Tensor, Tensor.cpu, inputs)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients and key-value cache; afterwards it is as it was."""
    with restored(model), preserved(model), torch.no_grad():
        model.eval()
        without_cache(model)
        yield


def difference(
    run: Run, outputs: Sequence[str], cases: Sequence[Case], tolerance: Tolerance, runtime: str
) -> Difference:
    """Run the file on every case and return the largest difference from PyTorch.

    Raises:
        ExportError: The runtime fails on a case.
        Differs: It gives something else than PyTorch, by more than the tolerance.
    """
    worst = Difference()
    for case in cases:
        try:
            actual = run([tensor.detach().cpu().contiguous() for tensor in case.inputs])
        except Exception as error:
            raise ExportError(
                f"{runtime} fails at {case.label}, where PyTorch doesn't ({first_line(error)}); nothing was written: where it is "
                "a size that it fails at, leave that out of `dynamic`."
            ) from error
        for name, expected, got in zip(outputs, case.expected, actual, strict=True):
            worst |= compare(f"{name!r} at {case.label}", expected, got, tolerance, runtime)
    return worst


def published(drafts: Mapping[Path, Path]) -> int:
    """Move drafts to where they belong, the last one last; what was there stays if one fails. Returns the bytes of all."""
    size = sum(draft.stat().st_size for draft in drafts)
    for target in drafts.values():
        if target.is_dir():
            raise ExportError(f"{target} is a folder, where a file is to be; move it, or choose another name.")
    interruption.check()
    with _all_or_none() as moved:
        for draft, target in drafts.items():
            with writing(target):
                moved.append((target, _put_aside(target, draft.with_name(f"{draft.name}.before"))))
                os.replace(draft, target)
    return size


@contextlib.contextmanager
def _all_or_none() -> Iterator[list[tuple[Path, Path | None]]]:
    """For files that were made, each with where lies what was there before: a failure takes them back."""
    moved: list[tuple[Path, Path | None]] = []
    try:
        yield moved
    except BaseException:
        for target, aside in reversed(moved):
            target.unlink(missing_ok=True)
            if aside:
                os.replace(aside, target)
        raise


def _put_aside(target: Path, aside: Path) -> Path | None:
    """Move a file away, if there is one; where to."""
    if not target.exists():
        return None
    os.replace(target, aside)
    return aside


def named_file(path: str | os.PathLike[str], suffix: str, usual: str) -> Path:
    """The file that a path names: itself, or for a folder the file of the usual name in it.

    Raises:
        ExportError: It has another suffix.
    """
    target = Path(path)
    target = target / usual if target.is_dir() else target
    if target.suffix != suffix:
        raise ExportError(f"{target} doesn't end in {suffix}: name a file such as {target.with_suffix(suffix)}.")
    return target
