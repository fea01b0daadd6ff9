"""For which sizes a captured program holds: code that asks for a size was captured on the way that the example's takes.

torch.export keeps what it was told so as a range of the size, and no ONNX file can say that it ends somewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from exporters.cases import Case, Subject, example_sizes, sized_case, sizes_of

Ranges = Mapping[str, tuple[int, int | None]]
"""Name of a free size -> the least size, and the largest, None where there is none."""

_FROM_THE_START = 2  # torch.export takes sizes of 0 and 1 for constants
_TIMES = 64  # the example's size: a run at more may take too long


def ranges_of(program: torch.onnx.ONNXProgram, subject: Subject) -> Ranges:
    """The ranges of the free sizes that have an end, as far as the program says."""
    exported = program.exported_program
    if exported is None:
        return {}
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    found: dict[str, tuple[int, int | None]] = {}
    for owner, given in zip(subject.inputs, exported.graph_signature.user_inputs, strict=False):
        shape = getattr(nodes[given].meta.get("val"), "shape", ()) if given in nodes else ()
        for dim, name in subject.dims.get(owner, {}).items():
            size = shape[dim] if dim < len(shape) else None
            bounds = exported.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if bounds is not None:
                found[name] = _number(bounds.lower) or 0, _number(bounds.upper)
    return {n: ends for n, ends in found.items() if ends[0] > _FROM_THE_START or ends[1] is not None}


def _number(bound: Any) -> int | None:
    return int(bound) if getattr(bound, "is_Integer", isinstance(bound, int)) else None


def cases_beyond(subject: Subject, ranges: Ranges) -> list[Case]:
    """Cases just outside of the ranges, one size changed in each, where PyTorch takes them."""
    usual = example_sizes(subject)
    found = []
    for name, (least, largest) in ranges.items():
        wanted = [least - 1] if least > _FROM_THE_START else []
        wanted += [largest + 1] if largest is not None and largest < _TIMES * usual[name] else []
        found += [sized_case(subject, {**usual, name: size}) for size in wanted]
    return [case for case in found if case is not None]


def apart(subject: Subject, ranges: Ranges, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """The cases within the ranges, and the others."""
    within: list[Case] = []
    beyond: list[Case] = []
    for case in cases:
        sizes = sizes_of(subject, case.inputs)
        inside = all(least <= sizes[name] <= (largest or sizes[name]) for name, (least, largest) in ranges.items())
        (within if inside else beyond).append(case)
    return within, beyond


def said(ranges: Ranges) -> str:
    """The ranges as part of a sentence: "batch up to 3, height from 8"."""
    return ", ".join(
        name + (f" from {least}" if least > _FROM_THE_START else "") + (f" up to {largest}" if largest else "")
        for name, (least, largest) in ranges.items()
    )
