"""From a module and example inputs to a captured program, with errors that say what didn't fit."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from depgraph.capture.containers import see_inside
from depgraph.capture.data import Rebound
from depgraph.capture.exported import CapturedProgram
from depgraph.capture.holding import held_by
from depgraph.capture.lowering import lower
from depgraph.capture.recording import Recording, record, record_decided
from depgraph.capture.training import Inputs, leaves_unread, related_in_training
from depgraph.capture.unfit import may_be_unfit, place_of, unfit
from depgraph.capture.validating import unvalidated
from depgraph.dense import form_of, packed_modules
from depgraph.errors import (
    CaptureError,
    DepgraphError,
    OpaqueValue,
    UnsupportedOperator,
    UnsupportedParameter,
    one_line,
)
from depgraph.graph import Program


@dataclass(frozen=True)
class Capture:
    """A model's exported program, its values and relations, and where its integers came from.

    `trained` says whether the relations are also those of its training forward.
    """

    exported: CapturedProgram
    program: Program
    recording: Recording
    trained: bool = False


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], strict: bool = False) -> Capture:
    """Capture `model` on example inputs as torch.export does, in eval mode and without gradients.

    Where that fails, or takes a part of the forward (under autocast, with gradients) for one operator, and not `strict`,
    the forward is captured as it runs on the values of the example inputs.

    Raises:
        UnsupportedParameter: a parameter is quantised, sparse or distributed.
        CaptureError: the inputs don't fit; or `strict`, and the control flow depends on the data.
        UnsupportedOperator: `strict`, and an operator has no rule.
    """
    check_parameters(model)
    see_inside((args, dict(kwargs)), "an example input")
    given, found = (model, args, dict(kwargs)), None
    with quiet(model), torch.no_grad():
        try:
            with dumps_dropped():
                found = _lowered(model, given[1:], record(*given), strict)
        except (UnsupportedOperator, OpaqueValue):
            raise
        except Exception as error:
            failure = error
        if found is not None and may_be_unfit(model, found.exported.graph) and (reason := unfit(*given)):
            raise CaptureError(reason)
        if found is not None and (strict or not _wraps(found.exported)):
            return found
        if not strict:
            try:
                return _lowered(model, given[1:], record_decided(*given), strict)
            except OpaqueValue:
                raise
            except Rebound as error:
                failure = error
            except Exception:  # what torch.export said is of more use
                pass
    if found is not None:
        return found
    if isinstance(failure, DepgraphError):
        raise failure
    with quiet(model), torch.no_grad():
        raise CaptureError(_explain(model, args, kwargs, failure)) from failure


def _wraps(exported: CapturedProgram) -> bool:
    """Is a part of the forward one operator in its graph?"""
    return any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in exported.graph.nodes)


def _lowered(model: nn.Module, inputs: Inputs, captured: tuple[CapturedProgram, Recording], strict: bool) -> Capture:
    exported, recording = captured
    held = held_by(model)
    program = lower(exported, strict, held)
    if not program.outputs:
        raise OpaqueValue(
            f"{type(model).__name__} gives no tensor, so that nothing says what must stay the same: let its forward return "
            "what it computes"
        )
    trained = None if strict or not leaves_unread(exported) else related_in_training(model, inputs, program, held)
    return Capture(exported, trained or program, recording, trained is not None)


def check_parameters(model: nn.Module) -> None:
    """Raise UnsupportedParameter for the first parameter, buffer or module that can't be sliced (buffers may be sparse)."""
    found = [f"parameter {name!r} is {kind}" for name, p in model.named_parameters() if (kind := _unsliceable(p))]
    found += [
        f"buffer {name!r} is {kind}"
        for name, buffer in model.named_buffers()
        if (kind := form_of(buffer)) and buffer.layout == torch.strided
    ]
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UnsupportedParameter(
            f"parameter {lazy[0]!r} has no shape yet, as its module is lazy: run the model once on inputs like the example before"
        )
    for what in (*found, *packed_modules(model)):
        raise UnsupportedParameter(f"{what} and can't be sliced: prune the model in dense floating-point form first")


def _unsliceable(tensor: torch.Tensor) -> str:
    if form := form_of(tensor):
        return form
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"quantised or packed ({tensor.dtype})"
    if tensor.dtype.itemsize == 1:
        return f"quantised ({tensor.dtype})"
    return ""


@contextlib.contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Eval mode and, where the model's config has the switch, no key-value cache; everything is put back afterwards.

    Functions that the model compiles run as they are written: a compiler takes what watches a forward for part of it.
    Distributions don't check values.
    What isn't a module, a file, has no modes.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if getattr(config, "use_cache", False) is True}
    try:
        for module in training:
            module.training = False
        for config in configs.values():
            config.use_cache = False
        with torch.compiler.set_stance("force_eager"), unvalidated():
            yield
    finally:
        for module in training:
            module.training = True
        for config in configs.values():
            config.use_cache = True


@contextlib.contextmanager
def dumps_dropped() -> Iterator[None]:
    """Holds back what is written to stderr, and the log: torch dumps its unfinished graph there when a capture fails."""
    held, before = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(held), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
    sys.stderr.write(held.getvalue())


def _explain(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    name, place = type(model).__name__, place_of(error)
    if _DATA_DEPENDENT.search(f"{type(error).__name__}: {error}"):
        return (
            f"{name} can't be captured: its control flow depends on the values of a tensor{place}; "
            "write that as torch.where, or take it out of the forward"
        )
    if reason := unfit(model, args, kwargs):
        return reason
    if "functorch" in str(error):
        return (
            f"{name} runs, but torch.export can't capture a derivative that torch.func takes in it{place}: take it with "
            "torch.autograd.grad under torch.enable_grad, or prune the submodule that can be captured"
        )
    if "found a fake tensor" in str(error):
        return (
            f"{name} runs, but torch.export loses track of a tensor in it{place} (of torch.func.vmap with out_dims other than "
            "0, say): write that without the transform, or prune the submodule that can be captured"
        )
    return (
        f"{name} runs, but torch.export can't capture it{place}: {one_line(error)}; "
        "change the code there, or prune the submodule that can be captured"
    )


_DATA_DEPENDENT = re.compile("data.?dependent|control flow|DynamicOutputShape", re.IGNORECASE)
