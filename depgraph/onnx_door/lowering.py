"""From an ONNX model whose shapes are known to values and relations: the same graph that the door of PyTorch leads to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from depgraph import rules
from depgraph.errors import UnsupportedOperator
from depgraph.graph import Program, Reason, Value
from depgraph.onnx_door.control import JOIN
from depgraph.onnx_door.evaluating import BODIES, Evaluator, bodies, place
from depgraph.onnx_door.naming import module_of
from depgraph.onnx_door.operands import PARTS, kind_of, settings, stored, target_of
from depgraph.rules import domains
from depgraph.rules.onnx_own import slices

INPUT, OUTPUT = "the model's inputs have this size", "the model's outputs have this size"
KINDS = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}
NO_SIZE = "it meets sizes that neither the file nor a run tells"
LEFT_OUT = "slices leave it out, which may differ with inputs of other sizes"
NOT_TAKEN = "a branch that the example doesn't take counts on it"


@dataclass
class Lowered:
    """A program, which value of the file each of its values is, and the operator of each name.

    `held` has the stored tensors by the names that the program gives them: the value of the file, and the operands that
    this name stands for (a vector that several operators share has a name for each of them). `entering` says for what enters
    the body of a loop what that is outside, `kinds` has the types of values that torch knows, by name.
    """

    program: Program = field(default_factory=Program)
    values: dict[ir.Value, Value] = field(default_factory=dict)
    operators: dict[str, ir.Node] = field(default_factory=dict)
    ops: dict[str, rules.Op] = field(default_factory=dict)
    held: dict[str, ir.Value] = field(default_factory=dict)
    uses: dict[tuple[ir.Node, int], Value] = field(default_factory=dict)
    mixing: dict[str, list[int]] = field(default_factory=dict)
    entering: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, torch.dtype] = field(default_factory=dict)

    def operand(self, node: ir.Node, position: int) -> Value | None:
        """The program's value of an operand; None where it is left out, holds no data, or its shape isn't known."""
        value = node.inputs[position]
        return None if value is None else self.uses.get((node, position), self.values.get(value))


def lower(model: ir.Model, evaluated: Evaluator, strict: bool) -> Lowered:
    """Lower a model. With `strict`, an operator without a rule raises UnsupportedOperator."""
    lowering = Lowering(model, evaluated, strict)
    lowering.run()
    return lowering.made


class Lowering:
    """One lowering, an operator at a time."""

    def __init__(self, model: ir.Model, evaluated: Evaluator, strict: bool) -> None:
        self.model = model
        self.seen = evaluated
        self.strict = strict
        self.made = Lowered()
        self.program = self.made.program
        self.taken: Counter[str] = Counter()
        self.names: dict[ir.Node, str] = {}
        self.meets: dict[ir.Value, bool] = {}

    def run(self) -> None:
        held = set(self.model.graph.initializers)
        for position, value in enumerate(v for v in self.model.graph.inputs if v.name not in held):
            self._input(position, value)
        self._body(self.model.graph)
        for position, value in enumerate(self.model.graph.outputs):
            self._output(position, value)
        for name, value in self.made.held.items():
            self._left_out(self.program.values[name], value)

    def _input(self, position: int, value: ir.Value) -> None:
        made, lift = self._add(value, "input"), f"input {position}"
        if made is None:
            return
        self.program.inputs[lift] = made
        for d, dim in enumerate(made.dims):
            text = f"dimension {d} of the model's input {position} ({value.name})"
            self.program.relations.fix(dim, Reason(text, lift, INPUT))

    def _left_out(self, made: Value, value: ir.Value) -> None:
        """Fix the indices that only slices leave out: a longer input may read them."""
        readers = [self.made.ops.get(self.names.get(node, "")) for node, _ in value.uses() if node.op_type == "Slice"]
        if not readers or len(readers) < len(value.uses()):
            return
        parts = [slices(op, len(made.shape)) for op in readers if op is not None]
        for d, size in enumerate(made.shape):
            read = np.zeros(size, dtype=bool)
            for part in parts:
                read[slice(None) if part is None else part.get(d, slice(None))] = True
            if not read.all():
                reason = Reason(f"no slice of {made.target!r} holds it", why=LEFT_OUT)
                self.program.relations.fix(made.dim(d), reason, np.flatnonzero(~read))

    def _output(self, position: int, value: ir.Value) -> None:
        made, lift = self.value(value), f"output {position}"
        if made is None:
            return
        self.program.outputs[lift] = made
        for d, dim in enumerate(made.dims):
            text = f"dimension {d} of the model's output {position} ({value.name})"
            self.program.relations.fix(dim, Reason(text, lift, OUTPUT))

    def _body(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type in BODIES and node.domain in ("", "ai.onnx"):
                self._control(node)
            elif node.op_type != "Constant":
                self._operator(node)

    def _name(self, name: str) -> str:
        self.taken[name] += 1
        return name if self.taken[name] == 1 else f"{name}#{self.taken[name]}"

    def _add(self, value: ir.Value, kind: Any, **more: Any) -> Value | None:
        """A value of the program for one of the file; None where its shape isn't known."""
        shape = self.seen.shape(value)
        if shape is None or not value.name:
            return None
        width = max(ir.DataType(self.seen.types[value].tensor_type.elem_type).bitwidth // 8, 1)
        made = self.program.add(self._name(str(value.name)), kind, shape, itemsize=width, **more)
        self.made.values.setdefault(value, made)
        if (kind_here := KINDS.get(ir.DataType(self.seen.types[value].tensor_type.elem_type))) is not None:
            self.made.kinds[made.name] = kind_here
        return made

    def value(self, value: ir.Value | None) -> Value | None:
        """The program's value; a stored tensor gets one when it is first read."""
        if value is None:
            return None
        found = self.made.values.get(value)
        return self._stored(value) if found is None and stored(value) is not None else found

    def _stored(self, value: ir.Value) -> Value | None:
        tensor = stored(value)
        assert tensor is not None
        kind = kind_of(value, tensor) if self._meets_data(value) else "constant"
        made = self._add(value, kind)
        if made is not None and kind != "constant":
            made.target = made.name
            self.made.held[made.name] = value
        return made

    def _operand(self, node: ir.Node, position: int) -> Value | None:
        """An operand that holds data. A vector that several operators share may be narrowed for each as suits it."""
        value = node.inputs[position]
        if value is None or position in settings(node):
            return None
        tensor = stored(value)
        alone = tensor is None or len(value.uses()) < 2 or len(tensor.shape) != 1 or not self._meets_data(value)
        if alone or any(user.op_type in PARTS for user, _ in value.uses()):
            return self.value(value)
        first = self.made.values.get(value)
        made = self._stored(value)
        if made is not None:
            self.made.uses[node, position] = made
            self.program.ties[made.target] = (first or made).target
        return made

    def _operator(self, node: ir.Node) -> None:
        if self._is_arithmetic(node):
            return
        op = self._op(node)
        for k, value in enumerate(node.outputs):
            made = self._add(value, "activation", module=module_of(node, value))
            if made is not None:
                op.outputs.append(made)
                op["results"].append(k)
        if op.outputs:
            op.name = op.outputs[0].name
        self.made.operators[op.name] = node
        self.names[node] = op.name
        self.made.ops[op.name] = op
        if node.op_type == "ConstantOfShape" and op.outputs and _is_float(self.seen, node.outputs[0]):
            made = op.outputs[0]
            made.kind, made.target = "parameter", made.name
            self.made.held[made.name] = node.outputs[0]
        complete = len(op.outputs) == sum(bool(v.name) for v in node.outputs) and self._sees_operands(node, op)
        mixed = len(self.program.relations.mixed)
        self._apply(op, complete)
        self.made.mixing[op.name] = [dim for dim, _ in self.program.relations.mixed[mixed:]]

    def _is_arithmetic(self, node: ir.Node) -> bool:
        """Does it only compute numbers that say how operators compute, such as shapes?"""
        return self._is_known(node) and not any(self._meets_data(v) for v in node.outputs)

    def _is_known(self, node: ir.Node) -> bool:
        return all(v in self.seen.known for v in node.outputs if v.name)

    def _meets_data(self, value: ir.Value) -> bool:
        """Does a known value go anywhere but into what says how operators compute?"""
        if value not in self.meets:
            self.meets[value] = value.is_graph_output() or any(
                k not in settings(node)
                and node.op_type not in ("Shape", "Size")
                and (not self._is_known(node) or any(self._meets_data(v) for v in node.outputs))
                for node, k in value.uses()
            )
        return self.meets[value]

    def _sees_operands(self, node: ir.Node, op: rules.Op) -> bool:
        """Is the shape of each operand known that holds data?"""
        return all(
            v is None or k in settings(node) or op["inputs"][k] is not None or v in self.seen.known
            for k, v in enumerate(node.inputs)
        )

    def _op(self, node: ir.Node) -> rules.Op:
        inputs = [self._operand(node, k) for k in range(len(node.inputs))]
        known = {k: self.seen.known[v] for k, v in enumerate(node.inputs) if v is not None and v in self.seen.known}
        plain = {name: attr.value for name, attr in node.attributes.items() if attr.type not in _HELD}
        arguments = {
            **plain,
            "inputs": inputs,
            "known": known,
            "given": {k for k, v in enumerate(node.inputs) if v is not None},
            "constant": {k for k, v in enumerate(node.inputs) if v is not None and stored(v) is not None},
            "opset": self.seen.opset(node.domain),
            "results": [],
        }
        return rules.Op(place(node), target_of(node), arguments, [], self.program, node.name or "")

    def _apply(self, op: rules.Op, complete: bool) -> None:
        function = rules.lookup(op.target)
        if function is not None and not complete:
            self._of_unknown_size(op)
            return
        if function is not None:
            try:
                function(op)
            except (ValueError, AssertionError, KeyError, IndexError, TypeError) as error:
                op.leave_alone(error)
            domains.follow(op)
            return
        if self.strict:
            raise op.no_rule()
        op.leave_alone()
        domains.follow(op)

    def _of_unknown_size(self, op: rules.Op) -> None:
        """What comes of an operator that nobody knows has sizes that neither the file nor a run tells: all stays."""
        if self.strict:
            raise UnsupportedOperator(
                f"operator {op.target} at {op.where}: {NO_SIZE}; trace with strict=False to leave its dims alone"
            )
        op.fix_all(NO_SIZE, NO_SIZE)
        domains.follow(op)

    def _control(self, node: ir.Node) -> None:
        """Bodies see the values around them; what they give is what the operator gives."""
        outputs = [self._add(value, "activation", module=module_of(node)) for value in node.outputs]
        for body in bodies(node):
            if body in self.seen.failed:
                self._leave(body)
                continue
            if node.op_type != "If":
                counters = 2 if node.op_type == "Loop" else 0
                for k, value in enumerate(body.inputs):
                    self._enter(value, node.inputs[k] if counters <= k < len(node.inputs) else None)
            self._body(body)
            JOIN[node.op_type](self, node, body, outputs)
        if (first := next((made for made in outputs if made is not None), None)) is not None:
            self.made.operators[first.name] = node

    def _enter(self, value: ir.Value, outer: ir.Value | None) -> None:
        """A value that enters a body, and what it is outside in the first round."""
        made, given = self._add(value, "activation"), self.value(outer)
        if made is not None and given is not None:
            self.made.entering[made.name] = given.name

    def _leave(self, body: ir.Graph) -> None:
        """A body that doesn't fit the example: what it reads from outside stays whole, unless any size will do for it."""
        nodes = list(_within(body))
        if all(node.op_type in _ANY_SIZE for node in nodes) and not body.initializers:
            return
        own = {value for node in nodes for value in node.outputs}
        for node in nodes:
            for value in node.inputs:
                made = self.value(value) if value is not None and value not in own else None
                for dim in made.dims if made is not None else ():
                    self.program.relations.fix(dim, Reason(f"{NOT_TAKEN} ({place(node)})", why=NOT_TAKEN))

    def join(self, a: Value | None, b: Value | None, axis: int | None = None) -> None:
        """Two values go together; `axis` of `b` is one that `a` doesn't have."""
        if a is None or b is None:
            return
        dims = [d for k, d in enumerate(b.dims) if axis is None or k != axis % len(b.shape)]
        if axis is not None:
            self.program.relations.fix(b.dim(axis), Reason("rounds of a loop are counted along it"))
        for left, right in zip(a.dims, dims, strict=False):
            if self.program.relations.sizes[left] == self.program.relations.sizes[right]:
                self.program.relations.align(left, right)
            else:
                for dim in (left, right):
                    self.program.relations.fix(dim, Reason("it changes from one round or branch to the other"))


_HELD = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)
_ANY_SIZE = frozenset(
    ["Squeeze", "Unsqueeze", "Identity", "Shape", "Gather", "Cast", "Constant", "Equal", "Not", "If", "Size"]
)


def _within(graph: ir.Graph) -> list[ir.Node]:
    """The operators of a body and of bodies within it."""
    return [n for node in graph for n in (node, *(m for body in bodies(node) for m in _within(body)))]


def _is_float(seen: Evaluator, value: ir.Value) -> bool:
    """A tensor of floats, and not of one number."""
    shape = seen.shape(value)
    dtype = ir.DataType(seen.types[value].tensor_type.elem_type)
    return shape is not None and dtype.is_floating_point() and int(np.prod(shape)) > 1
