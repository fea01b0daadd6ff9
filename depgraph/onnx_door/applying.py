"""Applying a plan to an ONNX model: cut, and checked in ONNX Runtime against the zeroed original."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from depgraph.cutting.comparing import TOLERANCE, difference
from depgraph.cutting.report import Check, CutReport
from depgraph.cutting.sides import Side
from depgraph.cutting.slicing import positions
from depgraph.cutting.surprises import narrower_outputs
from depgraph.errors import CheckError, CutError, PlanError
from depgraph.graph import Value
from depgraph.onnx_door.bypassing import idle, leave_out
from depgraph.onnx_door.copies import Cut
from depgraph.onnx_door.cutting import cut_model
from depgraph.onnx_door.loading import UNDECLARED
from depgraph.onnx_door.running import RunError, run_once, with_outputs
from depgraph.onnx_door.saving import OUTSIDE, lies_outside
from depgraph.onnx_door.skipping import forget_sums
from depgraph.onnx_door.watching import rounds, watched
from depgraph.onnx_door.zeroing import comparable, zeroed
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph
    from depgraph.plan import Plan

Arrays = list[np.ndarray]
_STEPS = 5e-2
"""What rounding to 8 bits on the way may make of rounding errors, as a share of the largest output."""
_MOST = 1e-2
"""The largest difference, as a share of the largest output, that depth is believed to make of rounding errors."""


def apply(plan: Plan, form: str = "auto", check: str = "default") -> CutReport:
    """Cut a copy of the model. Weights that nothing cuts are those of the original, cut ones are read when they are written.

    Raises:
        CutError: a size of the file can't follow the cut, or ``form="module"`` was asked for.
        CheckError: the result doesn't compute what the zeroed original computes, or a weight is NaN or infinite.
        PlanError: the model has changed since it was traced, or an option is none.
    """
    graph: OnnxGraph = plan.graph  # type: ignore[assignment]
    if form not in ("auto", "graph", "module"):
        raise PlanError(f"form={form!r} is not one of auto, module, graph")
    if check not in ("default", "none"):
        raise PlanError(f"check={check!r} is not one of default, none")
    if form == "module":
        raise CutError("an ONNX file has no module: leave form out")
    graph.check_unchanged()
    if check != "none":
        graph.require_finite(CheckError)
    made = cut_model(graph, plan.kept()) if plan.removal or not plan.branches else Cut.copy(graph.model)
    if plan.branches:
        leave_out(graph, made, plan.branches)
    checked = None if check == "none" else compare(plan, made)
    made.model.meta[OUTSIDE] = lies_outside(graph.model)
    forget_sums(made.model, graph.model)
    made.model.meta[UNDECLARED] = graph.model.meta.get(UNDECLARED, [])
    notes = [
        *plan.notes,
        *narrower_outputs(graph.capture.program, plan.kept()),
        *_narrower_inputs(graph, plan.kept()),
        *([graph.note] if graph.note else []),
    ]
    return CutReport(made.model, "file", graph.dense_cost, plan.cost(), checked, {}, tuple(notes))  # type: ignore[arg-type]


def _narrower_inputs(graph: OnnxGraph, kept: Kept) -> list[str]:
    """A note for each input that a cut makes narrower."""
    values = graph.capture.program.inputs.items()
    return [
        f"{lift} ({value.name}) now has shape {kept.shape(value)}, it had {value.shape}"
        for lift, value in values
        if kept.shape(value) != value.shape
    ]


def compare(plan: Plan, made: Cut) -> Check:
    """Run the pruned model, the zeroed original and the original; raises CheckError where the first two differ."""
    graph: OnnxGraph = plan.graph  # type: ignore[assignment]
    mixing = [name for name in plan.removal if not graph[name].exact]
    against = {name for name in plan.removal if graph[name].exact} | comparable(graph, mixing)
    exact = {name: groups for name, groups in plan.removal.items() if name in against}
    mixed = {name: groups for name, groups in plan.removal.items() if name not in exact}
    widths = graph.widths
    side = Side(widths.at(mixed), widths.at(exact))
    tolerance, names = _tolerance(graph), _present(made.model, watched(graph.model))
    zeros = zeroed(graph, side)
    if plan.branches:
        idle(graph, zeros, plan.branches)
    got = _run(graph, made.model, names, "the pruned model", plan.kept())
    expected = _narrow(
        graph,
        names,
        _run(graph, zeros.model, names, "the zeroed original", widths.at(mixed)),
        widths.at(exact),
        widths.at(mixed),
    )
    moved = _narrow(
        graph, names, _run(graph, graph.model, names, "the original", widths.at({})), plan.kept(), widths.at({})
    )
    error = difference(_torch(got), _torch(expected))
    if not error <= tolerance:
        tolerance = max(tolerance, _trembling(graph, names))
    moved_by = _moved_by(_torch(expected), _torch(moved))
    check = Check(error, moved_by, tolerance, len(exact), len(mixed), made.compared, branches=len(plan.branches))
    if not error <= tolerance:
        raise CheckError(
            f"the pruned {graph.name} differs from the zeroed original by {error:.1e} of the largest output "
            f"(allowed {tolerance:.0e}, the removal itself moved it by {check.sensitivity:.1e})"
        )
    return check


def _moved_by(expected: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    """How far the removal moved what is compared: all of it where only the shapes, which depend on the data, can be told apart."""
    alike = [(a, b) for a, b in zip(expected, dense, strict=True) if a.shape == b.shape]
    found = difference([a for a, _ in alike], [b for _, b in alike]) if alike else 0.0
    return found if len(alike) == len(expected) else max(found, 1.0)


def _trembling(graph: OnnxGraph, names: list[str]) -> float:
    """Four times how far what is compared moves, at most 1%, when the inputs of the original change in their last digits.

    Depth makes much of little: where one more rounding moves a file further than the usual tolerance, no cut can keep to that.
    """
    generator, given = np.random.default_rng(0), graph.inputs
    shaken = {
        name: np.nextafter(a, np.where(generator.random(a.shape) < 0.5, -1, 1).astype(a.dtype) * a.dtype.type(np.inf))
        if a.dtype in (np.float32, np.float64)
        else a
        for name, a in given.items()
    }
    asked = with_outputs(graph.model, names, graph.element_types())
    try:
        first, second = (_torch(run_once(asked, inputs, names)) for inputs in (given, shaken))
    except RunError:
        return 0.0
    return min(4 * difference(first, second), _MOST)


def _present(model: ir.Model, names: list[str]) -> list[str]:
    """Those of the values that the pruned model still has; its outputs where none are left."""
    there = {str(value.name) for node in model.graph for value in node.outputs}
    return [name for name in names if name in there] or [str(value.name) for value in model.graph.outputs]


def _tolerance(graph: OnnxGraph) -> float:
    """That of the least precise numbers on the way."""
    kinds = {value.dtype for g in graph.model.graphs() for value in g.initializers.values()}
    known = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
    found = [TOLERANCE[known[kind]] for kind in kinds if kind in known]
    return max([1e-4, *found, *([_STEPS] if rounds(graph.model) else [])])


def _run(graph: OnnxGraph, model: ir.Model, names: list[str], what: str, kept: Kept) -> Arrays:
    try:
        return run_once(with_outputs(model, names, graph.element_types()), graph.inputs_at(kept), names)
    except RunError as error:
        _require_running(graph)
        raise CheckError(f"{what} of {graph.name} can't be run to be checked: {error}") from error


def _require_running(graph: OnnxGraph) -> None:
    """Raise CheckError where the file itself doesn't run, whatever was cut."""
    try:
        run_once(graph.model, graph.inputs, [str(value.name) for value in graph.model.graph.outputs])
    except RunError as error:
        raise CheckError(
            f"{graph.name} itself can't be run, so that no cut of it can be checked: {error}; repair the file, or cut with check='none'"
        ) from error


def _narrow(graph: OnnxGraph, names: list[str], arrays: Arrays, kept: Kept, already: Kept) -> Arrays:
    """Values narrowed to `kept`, where they have been narrowed to `already` before."""
    values = [graph.capture.program.values.get(name) for name in names]
    for array, value in zip(arrays, values, strict=True):
        if value is not None and not _fits(graph, np.shape(array), value, already):
            raise CheckError(
                f"{graph.name}: {value.name!r} is of shape {np.shape(array)} in ONNX Runtime, where the file says "
                f"{already.shape(value)}: repair the attributes of what makes it, or cut with check='none'"
            )
    return [a if value is None else _narrowed(a, value, kept, already) for a, value in zip(arrays, values, strict=True)]


def _fits(graph: OnnxGraph, shape: tuple[int, ...], value: Value, kept: Kept) -> bool:
    """Is it the shape that is predicted? How many boxes, say, are found in data is another number with other weights."""
    if value.name not in graph.capture.evaluated.measured or len(shape) != len(value.shape):
        return shape == kept.shape(value)
    return all(size == kept.size(value.dim(d)) or kept.of(value, d) is None for d, size in enumerate(shape))


def _narrowed(array: np.ndarray, value: Value, kept: Kept, already: Kept) -> np.ndarray:
    for d in range(len(value.shape)):
        stays = kept.of(value, d)
        if stays is not None:
            array = array.take(positions(already.of(value, d), stays), axis=d)
    return array


def _torch(arrays: Arrays) -> list[torch.Tensor]:
    tensors = [np.asarray(array) for array in arrays if isinstance(array, np.ndarray) and array.dtype.kind in "fiub"]
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in tensors]
