"""Which versions of the ONNX operator set can be had, and which one a program has."""

from __future__ import annotations

import importlib
from typing import Any

import onnx

from depgraph.errors import ExportError

_CONVERTER = "onnxscript.version_converter._version_converter"
_USUAL = (18, 23)


def supported() -> tuple[int, int]:
    """The lowest and the highest operator set that torch's exporter, as installed, can be brought to."""
    try:
        converter: Any = importlib.import_module(_CONVERTER)
        low, high = int(converter.SUPPORTED_MIN_ONNX_OPSET), int(converter.SUPPORTED_MAX_ONNX_OPSET)
    except (ImportError, AttributeError):  # a later onnxscript may keep them elsewhere
        low, high = _USUAL
    return low, min(high, onnx.defs.onnx_opset_version())


def check_opset(opset: object) -> None:
    """Raise ExportError unless that operator set can be asked for."""
    low, high = supported()
    if isinstance(opset, bool) or not isinstance(opset, int) or not low <= opset <= high:
        raise ExportError(f"opset {opset!r} can't be exported to: give a whole number from {low} to {high}.")


def check_reached(program: Any, opset: int) -> None:
    """Raise ExportError unless the program has the operator set that was asked for: torch only logs it when not."""
    reached = program.model.opset_imports.get("")
    if reached != opset:
        raise ExportError(
            f"The graph could not be brought from opset {reached} to {opset}: give another opset, such as {reached}."
        )
