"""Why a file may differ from PyTorch though it was translated rightly: choices among equal values, code that sees the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.capture.keeping import unwritten
from depgraph.cutting.draws import may_draw
from exporters.calls import FlatModel
from exporters.cases import Case, Subject
from exporters.dynamic import Specialised, fixed_dims
from exporters.onnx_check import Differs, Tolerance, compare

_aten = torch.ops.aten

TIES = (
    "the model chooses (top-k, sort) among equal values: the file takes the first of them, where PyTorch takes any; it was "
    "checked against PyTorch taking the first"
)


class FirstOfEquals(TorchDispatchMode):
    """PyTorch, but of equal values the first are taken; `met` says whether it would have taken others."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operator's result, of two that are right the one that ONNX defines."""
        made = func(*args, **(kwargs or {}))
        choose = _CHOICES.get(func)
        if choose is None:
            return made
        chosen = choose(*args, **(kwargs or {}))
        self.met |= not torch.equal(chosen[1], made[1])
        return chosen


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    values, indices = _sort(x, dim, largest)
    return (values, indices) if x.ndim == 0 else (values.narrow(dim, 0, k), indices.narrow(dim, 0, k))


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=descending, stable=True)
    return values, indices


_CHOICES: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {_aten.topk.default: _topk, _aten.sort.default: _sort}


def with_first_of_equals(flat: FlatModel, cases: Sequence[Case]) -> list[Case] | None:
    """The cases with what PyTorch makes of them when it takes the first of equal values; None if that is what it does."""
    settled, met = [], False
    for case in cases:
        with FirstOfEquals() as mode, unwritten(flat) as written:
            outputs = pytree.tree_map(written.own, flat(*(t.clone() for t in case.inputs)))
        met |= mode.met
        settled.append(replace(case, expected=tuple(t.detach().cpu() for t in outputs)))
    return settled if met else None


def _resized(subject: Subject, case: Case) -> set[tuple[str, int]]:
    """The free dims (input, dim) in which the inputs of a case have another size than those that were captured."""
    return {
        (name, dim)
        for name, captured, given in zip(subject.inputs, subject.examples, case.inputs, strict=True)
        for dim in subject.dims.get(name, {})
        if captured.shape[dim] != given.shape[dim]
    }


def _draws(node: Node) -> bool:
    return node.op == "call_function" and may_draw(node)


def traced_otherwise(
    program: torch.onnx.ONNXProgram, subject: Subject, cases: Sequence[Case], tolerance: Tolerance
) -> Differs | Specialised | None:
    """An error that says so, if already what torch.export captured differs from the model, before any translation.

    Where that is only at other sizes than those captured, a free size is a constant in what was captured (after `int(rows / 4)`, say).
    """
    if program.exported_program is None:
        return None
    owner = type(subject.flat.model).__name__
    drawing = dict.fromkeys(str(node.target) for node in program.exported_program.graph.nodes if _draws(node))
    if drawing:
        return Differs(
            f"{owner} draws random numbers in eval mode ({', '.join(drawing)}), which a file draws otherwise, so that nothing can "
            "be compared; not written: let the model take them as an input."
        )
    for case in cases:
        try:
            module = program.exported_program.module()
            with unwritten(module) as written:
                captured = pytree.tree_map(written.own, module(*(t.clone() for t in case.inputs)))
        except Exception:  # a case of a size that the captured program refuses says nothing
            continue
        other = _first_other(subject, case, captured, tolerance)
        if other is not None and (changed := _resized(subject, case)):
            return fixed_dims(changed, {owner: dict(dims) for owner, dims in subject.dims.items()})
        if other is not None:
            return Differs(
                f"{owner} gives another {other!r} at {case.label} when torch.export captures it "
                "than when it runs, so its code asks whether it is captured (a mask that it then builds, say); not "
                "written: give the inputs for which it leaves out a part, such as masks, or mend that code."
            )
    return None


def _first_other(subject: Subject, case: Case, captured: Sequence[Tensor], tolerance: Tolerance) -> str | None:
    """The name of the first output that what was captured gives otherwise than the model."""
    for name, expected, got in zip(subject.outputs, case.expected, captured, strict=True):
        try:
            compare(f"{name!r} at {case.label}", expected, got.detach().numpy(), tolerance)
        except Differs:
            return name
    return None
