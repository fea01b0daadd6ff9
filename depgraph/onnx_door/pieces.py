"""ONNX Runtime on models too large to be held at once: a few operators at a time, whose weights are read for them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from depgraph.onnx_door.arrays import read_array
from depgraph.onnx_door.evaluating import bodies
from depgraph.onnx_door.operands import stored

Arrays = dict[str, np.ndarray]
_PIECE = 4 << 20
"""Bytes of weights from which on a new piece begins."""
_FED = 1 << 16
"""Bytes from which on a weight is handed over as an input, which the runtime takes as it is."""


class RunError(Exception):
    """ONNX Runtime can't load a model, or fails on its inputs."""


class LoadError(RunError):
    """ONNX Runtime can't load a model, whatever its inputs."""


def said(error: BaseException) -> str:
    """The first line of what the runtime says, without its own places."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


class Stage(NamedTuple):
    """Where a run stands: before the operators of a piece are run, or after (`done`), with the values that are there."""

    piece: list[ir.Node]
    values: Arrays
    done: bool


class Pieces:
    """A model that runs a piece of its main graph after the other; a new one begins in front of each of the operators `before`.

    With such, what stored tensors alone give is computed in the piece that reads it, from what is stored then.
    """

    def __init__(self, model: ir.Model, before: frozenset[ir.Node] = frozenset()) -> None:
        self.model = model
        self.late = {v: node for node in _from_stored(model.graph) for v in node.outputs} if before else {}
        self.pieces = [[*self._needed(piece), *piece] for piece in _pieces(model.graph, before, self.late)]

    def stored(self, name: str) -> np.ndarray | None:
        """What stored tensors alone give under a name, as they are now; None for anything else, or without `before`."""
        found = next((v for v in self.late if v.name == name), None)
        if found is None:
            return None
        chain = self._needed([self.late[found]])
        return self._one([*chain, self.late[found]], {}, [name])[0]

    def _needed(self, piece: list[ir.Node]) -> list[ir.Node]:
        """The operators on stored tensors whose results a piece reads, in order."""
        found: dict[ir.Node, None] = {}

        def see(node: ir.Node) -> None:
            for value in _read(node):
                if value in self.late and self.late[value] not in found:
                    see(self.late[value])
                    found[self.late[value]] = None

        for node in piece if self.late else ():
            see(node)
        return [node for node in found if node not in piece]

    def run(self, inputs: Arrays, names: Sequence[str]) -> list[np.ndarray]:
        """The named values; raises RunError."""
        values: Arrays = {}
        for stage in self.stages(inputs, frozenset(), names):
            values = stage.values
        return [values[name] for name in names]

    def stages(self, inputs: Arrays, shown: Container[str], kept: Container[str] = ()) -> Iterator[Stage]:
        """Before and after every piece; `shown` are names of values to have after the piece that makes them, `kept` to the end.

        Raises RunError.
        """
        values: Arrays = dict(inputs)
        last = {str(v.name): k for k, piece in enumerate(self.pieces) for node in piece for v in _read(node)}
        for k, piece in enumerate(self.pieces):
            yield Stage(piece, values, False)
            made = [str(v.name) for node in piece for v in node.outputs if v.name]
            wanted = [name for name in made if last.get(name, -1) > k or name in shown or name in kept]
            if wanted:
                try:
                    found = self._one(piece, values, wanted)
                except Exception as error:
                    raise RunError(f"ONNX Runtime fails on the inputs ({said(error)})") from error
                values.update(zip(wanted, found, strict=True))
            yield Stage(piece, values, True)
            values = {name: array for name, array in values.items() if last.get(name, -1) > k or name in kept}

    def _one(self, piece: list[ir.Node], values: Arrays, wanted: list[str]) -> list[np.ndarray]:
        graph = onnx.GraphProto(name="piece")
        inner = {v for node in piece for v in node.outputs}
        feeds: Arrays = {}
        for value in dict.fromkeys(v for node in piece for v in _read(node) if v not in inner):
            tensor, name = stored(value), str(value.name)
            if tensor is None:
                feeds[name] = values[name]
            elif tensor.nbytes >= _FED:
                feeds[name] = read_array(tensor)
            else:
                graph.initializer.append(
                    ir.serde.serialize_tensor(ir.Tensor(read_array(tensor), dtype=tensor.dtype, name=name))
                )
        graph.node.extend(ir.serde.serialize_node(node) for node in piece)
        graph.input.extend(_declared(name, array) for name, array in feeds.items())
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        sets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.model.opset_imports.items()]
        proto = onnx.helper.make_model(graph, opset_imports=sets, ir_version=max(self.model.ir_version, 4))
        import onnxruntime  # 20 MB that who prunes modules doesn't need

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(wanted, feeds))


def _declared(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _from_stored(graph: ir.Graph) -> Iterator[ir.Node]:
    """Operators of a graph that stored tensors alone go into, and whose results are no outputs."""
    known: set[ir.Value] = set()
    for node in graph:
        given = [v for v in node.inputs if v is not None]
        fixed = (
            given and all(v in known or stored(v) is not None for v in given) and not any(True for _ in bodies(node))
        )
        if fixed and not any(v.is_graph_output() for v in node.outputs):
            known.update(node.outputs)
            yield node


def _pieces(graph: ir.Graph, before: Container[ir.Node], late: Container[ir.Value]) -> Iterator[list[ir.Node]]:
    """Operators in order, a piece at a time; Constants, and what makes a `late` value, go with what reads them."""
    piece: list[ir.Node] = []
    size = 0
    for node in graph:
        if (node.op_type == "Constant" and not node.domain) or any(v in late for v in node.outputs):
            continue
        more = sum(tensor.nbytes for v in node.inputs if v is not None and (tensor := stored(v)) is not None)
        if piece and (size + more > _PIECE or node in before):
            yield piece
            piece, size = [], 0
        piece.append(node)
        size += more
    yield piece


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What an operator reads of the graph around it, in its bodies too."""
    yield from (value for value in node.inputs if value is not None)
    for body in bodies(node):
        own = {*body.inputs, *body.initializers.values(), *(v for inner in body for v in inner.outputs)}
        yield from (value for inner in body for value in _read(inner) if value not in own)
