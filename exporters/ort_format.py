"""ONNX Runtime's own format, which its small builds for phones and microcontrollers load."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from depgraph.errors import ExportError, first_line
from exporters import onnx_file
from exporters.feeds import Distance, as_feeds, distance
from exporters.onnx_check import open_session

TOLERANCE = 1e-4
"""The `Distance.error` that fusing operators may cause."""


@dataclass(frozen=True)
class OrtReport:
    """What was written.

    Attributes:
        bytes: Size on disk.
        distance: From the ONNX file, on the data.
        onnxruntime: The version that wrote it; older ones may not read it.
    """

    path: Path
    bytes: int
    distance: Distance
    onnxruntime: str

    def __str__(self) -> str:
        return (
            f"Wrote {self.path} ({self.bytes:,} bytes) for ONNX Runtime {self.onnxruntime} or later; its outputs differ from the "
            f"ONNX file's by {self.distance.error:.2g}."
        )


def to_ort(path: str | os.PathLike[str], out: str | os.PathLike[str], data: Iterable[Any] | None = None) -> OrtReport:
    """Write the ONNX file `path` as `out`, which ends in .ort, fused as far as any processor can run, and compare both.

    Args:
        data: Batches to compare on, as for `quantise`; None: one random batch of small sizes.

    Raises:
        ExportError: `out` doesn't end in .ort, ONNX Runtime fails, or the outputs differ. No file is left, one that was there
            stays.
    """
    source, target = Path(path), Path(out)
    if target.suffix != ".ort":
        raise ExportError(f"{target.name} must end in .ort: ONNX Runtime tells its format by that.")
    if not source.is_file():
        raise ExportError(f"There is no file {source} to convert.")
    original = open_session(source)
    with onnx_file.staging(target) as draft:
        _convert(source, draft)
        found = distance(original, open_session(draft), as_feeds(data, original))
        if not found.error <= TOLERANCE:
            raise ExportError(
                f"{target.name} computes something else than {source.name} ({found.error:.2g}); not written."
            )
        size = onnx_file.publish(draft, target)
    return OrtReport(target, size, found, onnxruntime.__version__)


def _convert(source: Path, draft: Path) -> None:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(draft)
    settings.add_session_config_entry("session.save_model_format", "ORT")
    settings.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime can't convert {source.name} ({first_line(error)}).") from error
