"""From a module and example inputs to a captured program, with errors that say what didn't fit."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depgraph.capture.containers import see_inside
from depgraph.capture.data import Rebound
from depgraph.capture.exported import CapturedProgram
from depgraph.capture.frames import shown
from depgraph.capture.holding import held_by
from depgraph.capture.keeping import unwritten
from depgraph.capture.lowering import lower
from depgraph.capture.recording import Recording, record, record_decided
from depgraph.capture.restoring import own_containers
from depgraph.capture.training import Inputs, leaves_unread, related_in_training
from depgraph.dense import form_of, packed_modules
from depgraph.errors import CaptureError, DepgraphError, OpaqueValue, UnsupportedOperator, UnsupportedParameter
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
        with torch.compiler.set_stance("force_eager"):
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
    name, place = type(model).__name__, _place(error)
    if _DATA_DEPENDENT.search(f"{type(error).__name__}: {error}"):
        return (
            f"{name} can't be captured: its control flow depends on the values of a tensor{place}; "
            "write that as torch.where, or take it out of the forward"
        )
    try:
        run_args, run_kwargs = own_containers((args, dict(kwargs)))
        with unwritten(model, *args, kwargs):
            model(*run_args, **run_kwargs)
    except Exception as failure:
        given = ", ".join([*map(_described, args), *(f"{k}={_described(v)}" for k, v in kwargs.items())])
        return (
            f"{name} doesn't run on these example inputs ({given or 'none'}){_place(failure)}: {_first_line(failure)}; "
            "give the arguments of one call of its forward"
        )
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
        f"{name} runs, but torch.export can't capture it{place}: {_first_line(error)}; "
        "change the code there, or prune the submodule that can be captured"
    )


_DATA_DEPENDENT = re.compile("data.?dependent|control flow|DynamicOutputShape", re.IGNORECASE)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}" if text else type(error).__name__


def _described(argument: Any) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    if not isinstance(argument, torch.Tensor):
        return type(argument).__name__
    return f"{str(argument.dtype).removeprefix('torch.')} {list(argument.shape)}"


def _place(error: BaseException) -> str:
    """The innermost frame of a traceback that is neither torch's, nor ours, nor the standard library's."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_absolute() and path.parent != _STANDARD and not any(root in path.parents for root in _LIBRARIES):
            found = f" at {shown(str(path))}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[1])
_STANDARD = Path(sysconfig.get_paths()["stdlib"])
