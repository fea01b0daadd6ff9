"""The dependency graph of an ONNX model: the same axes, groups, costs and plans, without a module behind them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from depgraph.dependency import DependencyGraph
from depgraph.errors import CaptureError, DepgraphError, PlanError, ScoreError
from depgraph.graph import Program
from depgraph.onnx_door.arrays import Weights, read_array
from depgraph.onnx_door.evaluating import Evaluator
from depgraph.onnx_door.examples import Arrays, declared_shapes, given_inputs, is_dynamic, made_up, runtime_inputs
from depgraph.onnx_door.folding import is_closed
from depgraph.onnx_door.loading import load
from depgraph.onnx_door.lowering import Lowered, lower
from depgraph.onnx_door.modules import Modules
from depgraph.onnx_door.operands import stored
from depgraph.onnx_door.pieces import LoadError
from depgraph.onnx_door.running import loads, measured_shapes, try_out
from depgraph.onnx_door.steps import by_products, steps_of
from depgraph.onnx_door.windows import bias_at
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.cutting.report import CutReport
    from depgraph.plan import Plan


@dataclass(frozen=True)
class OnnxCapture:
    """A captured file: its program, how that lies on the file, and all shapes at the example's sizes."""

    program: Program
    lowered: Lowered
    evaluated: Evaluator

    def __getattr__(self, name: str) -> Any:
        """What a captured module has beside, a file hasn't."""
        raise (
            ScoreError(
                f"this needs a PyTorch module ({name}), which an ONNX file doesn't hold: load the PyTorch model and trace that"
            )
            if not name.startswith("_")
            else AttributeError(name)
        )


class OnnxGraph(DependencyGraph):
    """What is coupled to what in one ONNX model. `args` is a dict of example inputs by name; `model` an onnx_ir.Model."""

    model: Any
    capture: Any
    form = "graph"

    def __init__(self, model: ir.Model, name: str, inputs: Arrays, captured: OnnxCapture, free: frozenset[str]) -> None:
        self._name = name
        super().__init__(model, (inputs,), {}, captured, free)  # type: ignore[arg-type]

    @property
    def inputs(self) -> Arrays:
        """The example inputs by name."""
        return self.args[0]

    def inputs_at(self, kept: Kept) -> Arrays:
        """The example inputs, narrowed as a cut makes them."""
        found = dict(self.inputs)
        for value in self.capture.program.inputs.values() if kept.masks else ():
            for d in range(len(value.shape)):
                stays = kept.of(value, d)
                if stays is not None:
                    found[value.name] = found[value.name].take(stays, axis=d)
        return found

    @property
    def name(self) -> str:
        return self._name

    @property
    def note(self) -> str:
        failed = len(self.capture.evaluated.failed)
        return f"{failed} branches that the example doesn't take weren't looked into" if failed else ""

    @cached_property
    def _steps(self) -> list[Any]:
        return steps_of(self.capture.lowered)

    @property
    def nodes(self) -> list[Any]:
        return self._steps

    def bias_of(self, op: str) -> tuple[str, bool]:
        """The stored vector that an operator, or an addition after it, adds to what it puts out; and whether there can be one."""
        found = bias_at(self.capture.lowered, op)
        if found is None or not found.there or found.node is None:
            return "", found is not None
        value = self.capture.lowered.operand(found.node, found.position)
        known = value is not None and value.name in self.capture.lowered.held
        return (value.name, True) if known and value is not None else ("", False)

    def observer(self) -> Any:
        from depgraph.onnx_door.observing import FileObserver

        return FileObserver(self)

    def again(self, model: Any) -> DependencyGraph:
        return trace_onnx(model, self.inputs, {}, strict=False, free=(), fixed=())

    def parameter_ranks(self) -> dict[str, int]:
        values = self.capture.program.values
        return {name: len(values[name].shape) for name in self.capture.lowered.held if values[name].kind == "parameter"}

    @cached_property
    def _modules(self) -> Modules:
        return Modules(self.capture.lowered)

    @cached_property
    def entries(self) -> tuple[str, ...]:
        return self._modules.entries

    @cached_property
    def _blocks(self) -> Any:
        """Entries of containers; stretches of the stream that are alike where the file's names tell of none."""
        from depgraph.blocks import Blocks
        from depgraph.onnx_door.stretches import Stretches

        named = Blocks(self.residual) if self.entries else None
        return named if named is not None and (named.found or named.refused) else Stretches(self.residual)

    def entries_of(self, container: str) -> int:
        held = sum(path.rpartition(".")[0] == container for path in self.entries)
        return held or sum(block.container == container for block in self.blocks)

    def likeness(self, path: str) -> tuple[object, ...]:
        return self._modules.likeness(path)

    def owner_of(self, target: str) -> str:
        return self._modules.owner(target)

    def has_parts(self, module: str) -> bool:
        inside = (
            name.removeprefix(f"{module}.") for name in self.capture.lowered.held if name.startswith(f"{module}.")
        )
        return any("." in name for name in inside)

    def check_unchanged(self) -> None:
        """Raise PlanError when a stored tensor is no longer what it was when the file was traced."""
        for name, value in self.capture.lowered.held.items():
            tensor, was = stored(value), self.capture.program.values[name].shape
            if tensor is not None and tuple(tensor.shape) != was:
                raise PlanError(
                    f"{self.name} has changed since it was traced: {name!r} was of shape {was} and is of shape "
                    f"{tuple(tensor.shape)}; trace it again"
                )

    def tensors(self) -> Any:
        """The weights by name, read when they are asked for; whole numbers of quantised weights as floats."""
        return Weights(self.capture.lowered.held, self.array)

    def tensor(self, name: str) -> Any:
        """One of `tensors`."""
        return self.tensors()[name]

    def element_types(self) -> dict[str, int]:
        """The element types of all values by name."""
        seen: Evaluator = self.capture.evaluated
        return seen.element_types(seen.types)

    def array(self, name: str) -> np.ndarray:
        """A stored tensor by the name that the graph gives it."""
        value = self.capture.lowered.held[name]
        tensor = stored(value)
        if tensor is not None:
            return read_array(tensor)
        node = value.producer()
        assert node is not None and node.op_type == "ConstantOfShape"
        fill = node.attributes["value"].value.numpy().reshape(-1)[0] if "value" in node.attributes else np.float32(0)
        return np.full(self.capture.program.values[name].shape, fill)

    def require_finite(self, error: type[DepgraphError]) -> None:
        """Raise `error` for the first stored tensor with NaN, or parameter with infinite values; those of a mask may be so."""
        for name in self.capture.lowered.held:
            array = self.array(name)
            if array.dtype.kind != "f" or np.isfinite(array.sum(dtype=np.float64)):
                continue
            parameter = self.capture.program.values[name].kind == "parameter"
            if np.isnan(array).any() or (parameter and not _is_mask(array)):
                raise error(f"{name!r} holds NaN or infinite values: repair or export the weights anew")

    def cut(self, plan: Plan, options: Mapping[str, Any]) -> CutReport:
        from depgraph.onnx_door.applying import apply

        return apply(plan, **options)


def trace_onnx(
    given: str | os.PathLike[str] | ir.Model,
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    strict: bool,
    free: tuple[str, ...],
    fixed: tuple[str, ...],
) -> OnnxGraph:
    """`depgraph.trace` for an ONNX model."""
    model, name = load(given)
    try:
        inputs, evaluated, lowered = _lowered(model, args, kwargs, strict)
        known = {**lowered.program.outputs, **lowered.program.inputs}
        for lift in (*free, *fixed):
            if lift not in known:
                raise PlanError(f"the model has no {lift}; it has {', '.join(known)}")
        lifted = (frozenset(free) | lowered.program.by_products) - frozenset(fixed)
        return OnnxGraph(model, name, inputs, OnnxCapture(lowered.program, lowered, evaluated), lifted)
    except DepgraphError:
        raise
    except Exception as error:  # names that aren't text, sizes without end: whatever a damaged file holds
        raise CaptureError(
            f"{name} can't be understood ({type(error).__name__}: {str(error)[:120]}): it is damaged, export it again"
        ) from error


def _lowered(model: ir.Model, args: Any, kwargs: Mapping[str, Any], strict: bool) -> tuple[Arrays, Evaluator, Lowered]:
    """The example inputs, shapes at these, and the program."""
    sizes = _sizes(args, kwargs)
    given = None if sizes is not None else given_inputs(model, args, kwargs)
    evaluated, inputs = _evaluated(model, given, sizes or {})
    lowered = lower(model, evaluated, strict)
    lowered.program.by_products = by_products(lowered)
    return inputs, evaluated, lowered


def _sizes(args: Any, kwargs: Mapping[str, Any]) -> dict[str, int] | None:
    """Sizes for open dims, where whole numbers are given in the place of arrays."""
    given = {**args, **kwargs} if isinstance(args, Mapping) else dict(kwargs)
    plain = given and all(isinstance(v, int) and not isinstance(v, bool) for v in given.values())
    return given if plain else None


def _evaluated(model: ir.Model, inputs: Arrays | None, sizes: dict[str, int]) -> tuple[Evaluator, Arrays]:
    """Shapes at the given inputs, or at the first made-up ones that go through."""
    if inputs is not None:
        return _measured(model, inputs), inputs
    dynamic = is_dynamic(model)
    first: CaptureError | None = None
    for trial in made_up(model, sizes, seed=0):
        try:
            found = _measured(model, trial)
            if dynamic:
                try_out(model, trial)
            return found, trial
        except CaptureError as error:
            first = first or error
            if not dynamic or isinstance(error.__cause__, LoadError):
                raise
    assert first is not None
    if not loads(model):
        raise first
    open_dims = [f"{v.name}{v.shape}" for v in runtime_inputs(model) if not is_closed(v.shape)]
    raise CaptureError(
        f"no sizes were found that the model runs at ({first}): give example inputs, or sizes, for {', '.join(open_dims)}"
    ) from first


def _is_mask(array: np.ndarray) -> bool:
    """Are all values that aren't infinite the same, as in what is added to scores before a softmax?"""
    finite = array[np.isfinite(array)]
    return finite.size == array.size or not finite.size or bool((finite == finite[0]).all())


def _measured(model: ir.Model, inputs: Arrays) -> Evaluator:
    """Shapes that no inference tells are looked up in a run, or in what the file says by names of sizes."""
    evaluated = Evaluator(model, inputs)
    if not evaluated.open:
        return evaluated
    found = measured_shapes(model, inputs, evaluated.element_types(evaluated.open))
    found = found or declared_shapes(model, inputs, evaluated.open)
    return Evaluator(model, inputs, found) if found else evaluated
