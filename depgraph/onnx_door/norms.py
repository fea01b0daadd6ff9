"""Batch norms of a file with the statistics of what comes in: what training mode does, which runtimes for inference don't have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from depgraph.onnx_door.copies import Cut, register
from depgraph.onnx_door.evaluating import attribute
from depgraph.onnx_door.examples import Arrays
from depgraph.onnx_door.operands import stored
from depgraph.onnx_door.pieces import RunError
from depgraph.onnx_door.running import Running

_AXES_GIVEN = 18  # the version of the operator set from which on reductions are given their axes


@dataclass(frozen=True)
class Seen:
    """Of what came into a batch norm in one batch: mean and variance (unbiased) for each channel."""

    mean: np.ndarray
    variance: np.ndarray


class BatchNorms:
    """The batch norms of a file's main graph whose statistics are stored, run with those of each batch instead."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.norms = [node for node in model.graph if _is_norm(node)]
        made = Cut.copy(model)
        twins = {old: twin for twin, old in made.nodes.items()}
        self.asked = [_written_out(twins[node], made.model) for node in self.norms]
        self.names = [str(value.name) for three in self.asked for value in three]
        made.model.graph.outputs.extend(value for three in self.asked for value in three)
        self.copy = made.model
        self._running: Running | None = None

    def run(self, inputs: Arrays) -> list[Seen]:
        """What comes into each in one batch; raises RunError, also where a channel has one value only."""
        self._running = self._running or Running(self.copy)
        found = iter(self._running(inputs, self.names))
        seen = []
        for node, mean, variance, sizes in zip(self.norms, found, found, found, strict=True):
            count = int(np.prod(sizes)) // mean.size
            if count < 2:
                raise RunError(f"one value for each channel comes into the batch norm {node.name!r}")
            seen.append(Seen(mean.reshape(-1), variance.reshape(-1) * (count / (count - 1))))
        return seen

    def set(self, node: ir.Node, seen: Seen) -> None:
        """Let a batch norm of the model hold these statistics."""
        for position, array in ((3, seen.mean), (4, seen.variance)):
            value = node.inputs[position]
            assert value is not None
            tensor = stored(value)
            assert tensor is not None
            name, taken = f"{value.name}_anew", self.model.graph.initializers
            name = next(n for n in (name, *(f"{name}_{k}" for k in range(len(taken) + 1))) if n not in taken)
            fresh = ir.Tensor(array.astype(tensor.dtype.numpy()), dtype=tensor.dtype, name=value.name)
            if value.is_initializer() and len(value.uses()) == 1:
                value.const_value = fresh
                continue
            fresh.name = name
            own = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=fresh)
            register(self.model.graph, own, self.model)
            node.replace_input_with(position, own)


def _is_norm(node: ir.Node) -> bool:
    held = node.inputs[3:5] if node.op_type == "BatchNormalization" else ()
    return bool(held) and all(value is not None and stored(value) is not None for value in held)


def _written_out(node: ir.Node, model: ir.Model) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Put operators in the place of a batch norm; gives the mean and variance of the batch, and the sizes of what came in."""
    source, scale, shift = node.inputs[:3]
    base, opset = str(node.outputs[0].name), model.opset_imports.get("", 1)

    def op(kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        made = ir.node(kind, list(inputs), attributes)  # type: ignore[arg-type]
        made.outputs[0].name = f"{base}_{kind}_{len(names)}"
        names.append(made.outputs[0].name)
        node.prepend(made)
        return made.outputs[0]

    def constant(array: np.ndarray) -> ir.Value:
        return op("Constant", value=ir.tensor(array))

    def mean_of(value: ir.Value) -> ir.Value:
        if opset < _AXES_GIVEN:
            return op("ReduceMean", value, axes=axes, keepdims=1)
        return op("ReduceMean", value, constant(np.array(axes, np.int64)), keepdims=1)

    names: list[str | None] = []
    assert source is not None and scale is not None and shift is not None
    axes = [0, 2]
    spread, sizes = constant(np.array([1, -1, 1], np.int64)), op("Shape", source)
    flat = op("Reshape", source, constant(np.array([0, 0, -1], np.int64)))
    mean = mean_of(flat)
    apart = op("Sub", flat, mean)
    variance = mean_of(op("Mul", apart, apart))
    kind = stored(node.inputs[3])  # type: ignore[arg-type]
    assert kind is not None
    small = constant(np.array(attribute(node, "epsilon", 1e-5), kind.dtype.numpy()))
    made = op("Div", apart, op("Sqrt", op("Add", variance, small)))
    made = op("Add", op("Mul", made, op("Reshape", scale, spread)), op("Reshape", shift, spread))
    made = op("Reshape", made, sizes)
    name, node.outputs[0].name = node.outputs[0].name, f"{base}_as_it_was"
    node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
    made.name = name
    for value in (mean, variance):
        value.type = ir.TensorType(kind.dtype)
    sizes.type = ir.TensorType(ir.DataType.INT64)
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=False)
    return mean, variance, sizes
