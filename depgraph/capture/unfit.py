"""Example inputs that a model can't take, found by running it: a capture looks at shapes, not at what kernels there are."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from depgraph.capture.frames import shown
from depgraph.capture.keeping import unwritten
from depgraph.capture.restoring import own_containers
from depgraph.errors import one_line

_ONE_DTYPE = frozenset(
    [
        "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "conv1d", "conv2d", "conv3d", "convolution",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "layer_norm", "batch_norm",
    ]
)  # fmt: skip
"""Operators that are captured with operands of several dtypes, and mostly don't run with them."""


def may_be_unfit(model: nn.Module, graph: Graph) -> bool:
    """Has an operator operands of several dtypes, where kernels mostly take one, and has the model values to try that with?"""
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    return any(len(_dtypes(node)) > 1 for node in graph.nodes if _name(node) in _ONE_DTYPE)


def unfit(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str = "these example inputs"
) -> str:
    """The sentence that says why `model` doesn't run on these inputs; empty where it does."""
    try:
        run_args, run_kwargs = own_containers((args, dict(kwargs)))
        with unwritten(model, *args, kwargs):
            model(*run_args, **run_kwargs)
    except Exception as failure:
        given = ", ".join([*map(_described, args), *(f"{k}={_described(v)}" for k, v in kwargs.items())])
        return (
            f"{type(model).__name__} doesn't run on {what} ({given or 'none'}){place_of(failure)}: "
            f"{one_line(failure)}; give the arguments of one call of its forward"
        )
    return ""


def place_of(error: BaseException) -> str:
    """The innermost frame of a traceback that is neither torch's, nor ours, nor the standard library's."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_absolute() and path.parent != _STANDARD and not any(root in path.parents for root in _LIBRARIES):
            found = f" at {shown(str(path))}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _described(argument: Any) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    if not isinstance(argument, torch.Tensor):
        return type(argument).__name__
    return f"{str(argument.dtype).removeprefix('torch.')} {list(argument.shape)}"


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else ""


def _dtypes(node: Node) -> set[torch.dtype]:
    values = (one.meta.get("val") for one in node.all_input_nodes)
    return {value.dtype for value in values if isinstance(value, torch.Tensor)} - {torch.bool}  # of masks


_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[1])
_STANDARD = Path(sysconfig.get_paths()["stdlib"])
