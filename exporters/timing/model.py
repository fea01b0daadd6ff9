"""A latency model made of measurements: each operator's time in the dense model, scaled by what its widths are worth.

    milliseconds(widths) = sum over operators of  measured(dense) * f(widths) / f(dense widths)

f is a table of the operator measured at other widths (convolutions, products with stored matrices), or else goes by the number of its
multiply-accumulates or elements, through its time in the model at half of all widths. Short operators are compared within one file
and run, and long ones by their thread's own time, so it makes little difference how busy the machine is.
"""

from __future__ import annotations

import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import depgraph
from depgraph.dependency import DependencyGraph
from depgraph.errors import ProfileError, TargetError
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.widths import Kept
from exporters.calls import flatten_call
from exporters.onnx_export import OnnxOptions, to_onnx
from exporters.timing.carrying import Carrier
from exporters.timing.kit import key_of
from exporters.timing.narrow import halved, through
from exporters.timing.operators import CONV, PRODUCT, Classes, Operators, Shape
from exporters.timing.profile import Profile, measured_profile
from exporters.timing.tables import Alone, Grid

_FUSED = {
    "Conv": CONV,
    "FusedConv": CONV,
    "MatMul": PRODUCT,
    "Gemm": PRODUCT,
    "FusedMatMul": PRODUCT,
    "FusedGemm": PRODUCT,
}
_NUMBER = re.compile(r"n(\d+)(?!\d)")
_SEEN = 0.02  # milliseconds: an operator that takes less is too short to see in what way it follows its size
_AT_LEAST = 0.003  # milliseconds: an operator that takes less is taken to cost the same at any size
_LONG = 1.0  # milliseconds: an operator that takes more may never run without another program's turn within it
_BETWEEN = 0.003  # milliseconds from one operator to the next, at the most
_BETWEEN_ALL = "between operators"
Function = Callable[[tuple[int, ...]], float]


@dataclass
class _Part:
    """One operator: its dense milliseconds and what they are multiplied by at the sizes of some classes of dims."""

    name: str
    dense: float
    classes: Classes = ()
    alone: float = 0.0  # milliseconds by its table
    share: Function = field(default=lambda sizes: 1.0)
    known: dict[tuple[int, ...], float] = field(default_factory=dict)
    ops: tuple[str, ...] = ()  # the operators that it goes with, all of them: its own, or those run before and after it
    often: int = 1

    def ms(self, sizes: list[int]) -> float:
        at = tuple(sizes[number] for number in self.classes)
        if at not in self.known:
            self.known[at] = self.dense * self.share(at)
        return self.known[at]


class MeasuredLatency:
    """Milliseconds of one run of a model by measured operators; a `depgraph.latency.LatencyModel` for `graph`."""

    def __init__(self, graph: DependencyGraph, file: OnnxGraph, profile: Profile) -> None:
        profile.check_fits(file)
        self.graph, self.file, self.profile = graph, file, profile
        self.carrier = Carrier(graph, file)
        self._parts = list(_parts(Operators(file), profile))
        self.dense_ms = profile.dense_ms

    @classmethod
    def of(
        cls,
        graph: DependencyGraph,
        profile: Profile | None = None,
        *,
        runs: int = 30,
        threads: int = 1,
        file: OnnxGraph | None = None,
    ) -> MeasuredLatency:
        """The latency model of a traced module or ONNX file.

        Args:
            profile: What was measured on a device; without it this machine is measured, with so many runs and threads.
            file: The graph of the module's file, at the same sizes; None: the module is exported for it.

        Raises:
            ExportError: the module can't be exported, so there is nothing that ONNX Runtime could run.
            ProfileError: the profile is of another model, or measuring failed.
        """
        file = file or onnx_graph(graph)
        return cls(graph, file, profile or measured_profile(file, runs, threads))

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before trusting it, a sentence each."""
        lost = self.carrier.lost() if self.graph is not self.file else []
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        found = (
            [f"axis {lost[0]!r}{more} of the ONNX file has no counterpart in the module: its time stays"]
            if lost
            else []
        )
        return (*self.profile.warnings, *found)

    def ms(self, kept: Kept, /) -> float:
        sizes, gone = self._sizes(kept), self.carrier.gone(kept.left_out)
        if not gone:
            return sum(part.ms(sizes) for part in self._parts)
        return sum(ms for _, ms in self._without(sizes, gone))

    def parts(self, kept: Kept, /) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for part, ms in self._without(self._sizes(kept), self.carrier.gone(kept.left_out)):
            found[part.name] = found.get(part.name, 0.0) + ms
        return found

    def _without(self, sizes: list[int], gone: frozenset[str]) -> Iterator[tuple[_Part, float]]:
        """What each operator takes that is left, and what is left of the time between operators."""
        left = [part for part in self._parts if not (part.ops and gone.issuperset(part.ops))]
        share = sum(part.often for part in left) / sum(part.often for part in self._parts)
        return ((part, part.ms(sizes) * (share if part.name == _BETWEEN_ALL else 1.0)) for part in left)

    def _sizes(self, kept: Kept) -> list[int]:
        if kept.widths is not self.graph.widths:
            raise TargetError(
                "the latency model is of another graph than the plan: make one for it with exporters.MeasuredLatency.of(graph)"
            )
        return self.carrier.kept(kept).class_sizes().tolist()


def onnx_graph(graph: DependencyGraph) -> OnnxGraph:
    """The graph of the ONNX file of a traced model, at the same sizes of its inputs; raises ExportError."""
    if isinstance(graph, OnnxGraph):
        return graph
    call = flatten_call(graph.model, graph.args, graph.kwargs).as_float32()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph.name}.onnx"
        to_onnx(graph.model, graph.args, path, graph.kwargs, options=OnnxOptions(dtype="float32"))
        inputs = {name: t.detach().cpu().numpy() for name, t in zip(call.names, call.tensors, strict=True)}
        return graph_of_file(path, inputs, graph.name)


def graph_of_file(path: Path, inputs: Mapping[str, Any], name: str) -> OnnxGraph:
    """The graph of an ONNX file that may go away, at the sizes of inputs by name; `name` is what it is called in sentences."""
    found = depgraph.trace(_in_memory(path), inputs)
    assert isinstance(found, OnnxGraph)
    found._name = name
    return found


def _in_memory(path: Path) -> Any:
    """An ONNX model with its weights read, as its folder will be gone."""
    import onnx_ir

    model = onnx_ir.load(path)
    return onnx_ir.external_data.load_to_model(model)


def _parts(operators: Operators, profile: Profile) -> Iterator[_Part]:
    """The operators that ONNX Runtime ran, each with what its time depends on; together they take the dense model's time."""
    measured = profile.data["dense"]["nodes"]
    known = _Known(profile.tables(), profile.narrow, halved(operators.graph).class_sizes())
    claimed = _claimed(operators, measured)
    found = [_part(operators, known, *entry) for entry in zip(measured, claimed, strict=True)]
    for part, node, ops in zip(found, measured, _gone_with(operators, claimed), strict=True):
        part.ops, part.often = ops, node["often"]
    between = profile.dense_ms - sum(part.dense for part in found)  # before other programs' turns are taken from these
    between = min(max(between, 0.0), _BETWEEN * sum(node["often"] for node in measured))
    _undisturbed(found)
    total = sum(part.dense for part in found)
    if between:
        yield _Part(_BETWEEN_ALL, between, often=0)
    for part in found:
        part.dense *= (profile.dense_ms - between) / total if total else 0.0
        yield part


class _Known(NamedTuple):
    """What a profile knows of operators at other sizes: tables by signature; times at the narrow model's sizes of classes."""

    tables: Mapping[str, Grid | Alone]
    narrow: Mapping[tuple[str, str], Mapping[str, Any]]
    sizes: np.ndarray

    def like(self, operators: Operators, node: Mapping[str, Any]) -> Shape:
        """The runs of activations that are shaped as what an operator makes, in the narrow model too."""
        runs, half = operators.like(tuple(node["shape"])), self.narrow.get((node["name"], node["op"]))
        alike = [run for run in runs if half and [int(self.sizes[number]) for number in run] == list(half["shape"])]
        return Shape(tuple(alike) or runs)


def _part(operators: Operators, known: _Known, node: Mapping[str, Any], position: int | None) -> _Part:
    """A measured operator, which is that at a position of the file or else not known to be one."""
    sizes = operators.graph.widths.classes.size
    shape = operators.shape(position) if position is not None else known.like(operators, node)
    name = operators.name(position) if position is not None else f"{node['name']} ({node['op']})"
    part = _Part(name, node["ms"])
    if shape.signature is not None:
        table = known.tables.get(key_of(shape.signature))
        if table is None:
            raise ProfileError(
                f"the profile has no times of {key_of(shape.signature)}: make it again with `depgraph profile`"
            )
        part.classes = shape.runs[0]
        part.alone = table.ms(*(int(sizes[number]) for number in part.classes))
        part.share = _looked_up(table, part.alone)
    elif shape.runs:
        part.classes = tuple(number for run in shape.runs for number in run)
        dense, halves = (tuple(int(of[n]) for n in part.classes) for of in (sizes, known.sizes))
        half = known.narrow.get((node["name"], node["op"])) if node["ms"] >= _SEEN else None
        part.share = _counted(tuple(map(len, shape.runs)), (dense, halves), node, None if half is None else half["ms"])
    return part


def _gone_with(operators: Operators, claimed: list[int | None]) -> Iterator[tuple[str, ...]]:
    """With which operators of the file each measured one goes: its own, or, not known to be one, those run before and after it."""
    places = [k for k, position in enumerate(claimed) if position is not None]
    for k, position in enumerate(claimed):
        around = [max((p for p in places if p < k), default=None), min((p for p in places if p > k), default=None)]
        known = [claimed[p] for p in around if p is not None] if position is None else [position]
        yield tuple(operators.op(at) for at in known if at is not None)


def _undisturbed(parts: list[_Part]) -> None:
    """Take from long operators what other programs took of their time.

    Times in the dense model are by the clock, those of tables aren't where they are long (exporters/timing/measure.py). By as much
    as short operators take longer in the model than alone, long ones do too.
    """
    short = [part.dense / part.alone for part in parts if part.alone and part.dense <= _LONG]
    longer = statistics.median(short) if short else 1.0
    for part in parts:
        if part.alone and part.dense > _LONG:
            part.dense = min(part.dense, part.alone * longer)


def _looked_up(table: Grid | Alone, dense: float) -> Function:
    return lambda sizes: table.ms(*sizes) / dense if dense else 1.0


def _counted(
    lengths: tuple[int, ...],
    widths: tuple[tuple[int, ...], tuple[int, ...]],
    node: Mapping[str, Any],
    half: float | None,
) -> Function:
    """By the sum of the runs: in proportion to it, but for what an operator costs at any size, or through its time at half of the widths.

    `widths` are the sizes in the dense model and in the narrow one, where it takes `half` milliseconds, None where that isn't known.
    """

    def total(sizes: tuple[int, ...]) -> int:
        found, start = 0, 0
        for length in lengths:
            found += math.prod(sizes[start : start + length])
            start += length
        return found

    whole, fixed = max(total(widths[0]), 1), min(_AT_LEAST * node["often"] / node["ms"], 1.0) if node["ms"] else 1.0
    less = total(widths[1])
    if half is None or not less < whole:
        return lambda sizes: fixed + (1 - fixed) * total(sizes) / whole
    share = half / node["ms"]
    least = max(share - (1 - share) * less / (whole - less), min(fixed, share))  # of nothing, on the line through both
    line = through([(0.0, least), (float(less), min(share, 1.0)), (float(whole), 1.0)])
    return lambda sizes: line(total(sizes))


def _claimed(operators: Operators, measured: list[Mapping[str, Any]]) -> list[int | None]:
    """Which operator of the file each measured one is.

    ONNX Runtime names a fused operator after one of its parts. A convolution or product that is named after what follows it
    is the nearest before that which no other is named after.
    """
    found: list[int | None] = [_named(operators, node) for node in measured]
    taken = {k for k in found if k is not None}
    for place, node in enumerate(measured):
        position, wanted = found[place], _FUSED.get(node["op"])
        if position is None or wanted is None or operators.nodes[position].op_type in wanted:
            continue
        for before in operators.upstream(position):
            if operators.nodes[before].op_type in wanted and before not in taken:
                found[place] = before
                taken.add(before)
                break
    return found


def _named(operators: Operators, node: Mapping[str, Any]) -> int | None:
    match = _NUMBER.match(node["name"])
    return int(match[1]) if match and int(match[1]) < len(operators.nodes) else None
