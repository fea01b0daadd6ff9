"""`trace`: which door a model comes in by."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from depgraph import dependency
from depgraph.capture.programs import as_module
from depgraph.dependency import DependencyGraph
from depgraph.errors import CaptureError, PlanError


def trace(
    model: Any,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    free: Iterable[str] = (),
    fixed: Iterable[str] = (),
) -> DependencyGraph:
    """Find what is coupled to what, in a PyTorch module (`depgraph.dependency.trace`) or an ONNX file.

    Args:
        model: a module; or the path of an ONNX file, or an `onnx_ir.Model`. Of a program of torch.export (whose example inputs
            needn't be given again), and of TorchScript, the graph's `model` is the module that torch makes of it.
        args: example inputs: a tuple, a single tensor; for ONNX also a dict by name of arrays, or of whole numbers for the
            sizes that the file leaves open. Left out for ONNX, inputs are made up.
        kwargs: keyword example inputs.
        strict: raise UnsupportedOperator for an operator without a rule, instead of leaving its dims alone.
        free: customs to lift, by name: ``"output 0"`` lets the width of the model's first output change.
        fixed: by-products to leave as they are, by name.

    Raises:
        CaptureError: the inputs don't fit the model, its control flow depends on data, or the file is no sound ONNX file.
        CheckpointError: the file can't be read.
        UnsupportedParameter: a parameter is quantised, sparse or distributed.
        PlanError: `free` or `fixed` names no output, or is a single name.
    """
    for option, names in {"free": free, "fixed": fixed}.items():
        if isinstance(names, str):
            raise PlanError(f"{option}={names!r} is a single name: give a list of names")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(
            f"the keyword example inputs are a {type(kwargs).__name__}: give a dict of arguments by name"
        )
    if _is_file(model):
        from depgraph.onnx_door.graph import trace_onnx

        return trace_onnx(model, args, kwargs or {}, strict=strict, free=(*free,), fixed=(*fixed,))
    model, args, kwargs = as_module(model, args, kwargs or {})
    return dependency.trace(model, args, kwargs, strict=strict, free=free, fixed=fixed)


def _is_file(model: Any) -> bool:
    loaded = sys.modules.get("onnx_ir")  # whoever has one of its models has imported it
    return isinstance(model, (str, os.PathLike)) or (loaded is not None and isinstance(model, loaded.Model))
