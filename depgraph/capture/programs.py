"""Programs in the place of modules, what torch.export makes and TorchScript, as modules that can be captured and cut."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.parallel import DistributedDataParallel

from depgraph.capture.capturing import dumps_dropped
from depgraph.errors import CaptureError, one_line


def as_module(model: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any, Mapping[str, Any]]:
    """A model and its example inputs; a module in the place of a program, which may have brought inputs of its own.

    Raises CaptureError for TorchScript that torch makes no program of, and for what wraps a model to train it.
    """
    if isinstance(model, ExportedProgram):
        nothing = isinstance(args, (tuple, list)) and not args and not kwargs
        given = (model.example_inputs if nothing else None) or (args, kwargs)
        return (model.module(), *given)
    if isinstance(model, torch.jit.ScriptModule):
        return _of_script(model, args, kwargs), args, kwargs
    if isinstance(model, DistributedDataParallel):
        raise CaptureError(
            "DistributedDataParallel sends gradients of the parameters that it was made with: prune what it wraps, model.module, and "
            "wrap what comes of that"
        )
    return model, args, kwargs


def _of_script(model: torch.jit.ScriptModule, args: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    """The module of the program that torch makes of TorchScript; any size of an input may be another."""
    from torch._export.converter import TS2EPConverter

    name = getattr(model, "original_name", type(model).__name__)
    if kwargs:
        raise CaptureError(f"{name} is TorchScript, whose example inputs are given by position: leave kwargs out")
    try:
        with dumps_dropped(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = TS2EPConverter(model, args if isinstance(args, tuple) else (args,)).convert()
    except Exception as error:
        raise CaptureError(
            f"{name} is TorchScript, of which torch can make no program ({one_line(error)}): give the module that it was made of"
        ) from error
    return program.module()
