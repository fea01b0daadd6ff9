"""ONNX Runtime on models in memory: outputs, and any other values by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from depgraph.errors import CaptureError
from depgraph.onnx_door.arrays import read_array
from depgraph.onnx_door.examples import Arrays, runtime_inputs
from depgraph.onnx_door.pieces import LoadError, Pieces, RunError, said

_INLINE = 1 << 29
"""Bytes of weights up to which a model is handed to the runtime in memory."""
_PIECEWISE = 1 << 24
"""Bytes of weights from which on a single run goes piece by piece."""


class Running:
    """A model in ONNX Runtime, on one thread of the CPU; one that is too large is run piece by piece."""

    def __init__(self, model: ir.Model) -> None:
        self.outputs = [str(output.name) for output in model.graph.outputs]
        self.inputs = frozenset(str(value.name) for value in runtime_inputs(model))
        self.pieces = Pieces(model) if is_large(model) else None
        import onnxruntime  # 20 MB that who prunes modules doesn't need

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if self.pieces is not None:
            return
        try:
            source = ir.to_proto(_in_memory(model)).SerializeToString()
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise LoadError(f"ONNX Runtime can't load the model ({said(error)})") from error

    def __call__(self, inputs: Arrays, names: Sequence[str] | None = None) -> list[np.ndarray]:
        """The outputs of these names, all by default; raises RunError."""
        wanted = list(names) if names is not None else self.outputs
        try:
            if self.pieces is not None:
                return self.pieces.run(inputs, wanted)
            return list(self.session.run(wanted, inputs))
        except RunError:
            raise
        except Exception as error:
            raise RunError(f"ONNX Runtime fails on the inputs ({said(error)})") from error


def run_once(model: ir.Model, inputs: Arrays, names: Sequence[str]) -> list[np.ndarray]:
    """The named values of one run, which isn't worth a copy of many weights: piece by piece, where the model lets itself be.

    Raises RunError.
    """
    if _PIECEWISE < weight_bytes(model) <= _INLINE:
        try:
            return Pieces(model).run(inputs, names)
        except (RunError, KeyError):  # what goes from piece to piece may be no arrays, and an output a stored tensor
            pass
    return Running(model)(inputs, names)


def _in_memory(model: ir.Model) -> ir.Model:
    """A copy whose weights don't lie beside a file."""
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(read_array(tensor), dtype=tensor.dtype, name=tensor.name)
    return copy


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return sum(int(t.nbytes) for t in tensors if t is not None)


def is_large(model: ir.Model) -> bool:
    """Has a model so many weights that it is run piece by piece?"""
    return weight_bytes(model) > _INLINE


def with_outputs(model: ir.Model, names: Iterable[str], types: Mapping[str, int] | None = None) -> ir.Model:
    """A copy of a model that also gives the named values of its main graph; `types` are their element types."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    present = {str(v.name) for v in copy.graph.outputs}
    for name in names:
        if name in values and name not in present:
            value = values[name]
            if value.type is None and types is not None and name in types:
                value.type = ir.TensorType(ir.DataType(types[name]))
            copy.graph.outputs.append(value)
            present.add(name)
    return copy


def measured_shapes(model: ir.Model, inputs: Arrays, types: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of named values of the main graph as a run on the inputs gives them; `types` are their element types.

    Empty where the model doesn't run, or is too large to try.
    """
    if is_large(model):
        return {}
    made_here = {str(v.name) for node in model.graph for v in node.outputs}
    names = [name for name in types if name in made_here]
    asked = with_outputs(model, names, types)
    try:
        outputs = [str(value.name) for value in asked.graph.outputs]
        made = dict(zip(outputs, run_once(asked, inputs, outputs), strict=True))
    except (RunError, ValueError):
        return {}
    return {name: tuple(made[name].shape) for name in names if isinstance(made.get(name), np.ndarray)}


def try_out(model: ir.Model, inputs: Arrays) -> None:
    """Raise CaptureError where the model doesn't run on the inputs.

    One that is too large to try is believed to, and one with operators from outside ONNX that the runtime doesn't have can't
    be tried.
    """
    if is_large(model):
        return
    try:
        run_once(model, inputs, [str(value.name) for value in model.graph.outputs])
    except RunError as error:
        if isinstance(error, LoadError) and any(node.domain not in ("", "ai.onnx") for node in model.graph.all_nodes()):
            return
        raise CaptureError(str(error)) from error


def loads(model: ir.Model) -> bool:
    """Does the runtime take the model, whatever inputs it may get? One that is too large to try is believed to be taken."""
    try:
        return is_large(model) or bool(Running(model))
    except LoadError:
        return False
