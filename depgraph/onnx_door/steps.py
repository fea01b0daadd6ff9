"""An ONNX model's operators as `depgraph.layers` reads a graph: steps that have names, operands and users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from depgraph.capture.lowering import final_outputs
from depgraph.graph import Value
from depgraph.onnx_door.evaluating import attribute, bodies
from depgraph.onnx_door.naming import path_of
from depgraph.onnx_door.skipping import SKIPS, adds_and_norms, bias_of, branch_side

if TYPE_CHECKING:
    from depgraph.onnx_door.lowering import Lowered

_CALLED = {
    "Conv": "convolution",
    "ConvTranspose": "convolution",
    "FusedConv": "convolution",
    "ConvInteger": "convolution",
    "QLinearConv": "convolution",
    "Gemm": "linear",
    "FusedGemm": "linear",
    "MatMul": "matmul",
    "FusedMatMul": "matmul",
    "Cast": "to",
    "Identity": "alias",
    "Sum": "add",
    "SkipLayerNormalization": "layernormalization",
    "SkipSimplifiedLayerNormalization": "simplifiedlayernormalization",
    "EmbedLayerNormalization": "embedding",
}
"""What operators are called in words about axes, where that isn't their name in lower case."""
_HANDS_ON = frozenset(["onnx.alias", "onnx.to"])
_OPERANDS = {
    **dict.fromkeys(("Add", "Sub", "Sum"), ("self", "other")),
    **dict.fromkeys(("Conv", "ConvTranspose", "FusedConv"), ("input", "weight")),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention"), ("query", "key", "value")),
}
"""Operands that are asked for by name."""


@dataclass(eq=False)
class Step:
    """An operator, or a value from outside (a "placeholder"), with those whose results it takes."""

    op: str
    name: str
    target: str = ""
    all_input_nodes: list[Step] = field(default_factory=list)
    users: dict[Step, None] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    operator: ir.Node | None = None
    meta: dict[str, Any] = field(default_factory=lambda: {"val": ()})
    """"val": an empty tensor of the shape and type of what it makes, a tuple where that are several."""
    part: int | None = None
    """Of a fused operator: which of the operators that it comes apart into, see `skipping.take_apart`."""


def steps_of(lowered: Lowered) -> list[Step]:
    """All steps in the order of execution."""
    return _Steps(lowered).steps


class _Steps:
    """Builds steps; `made` has the one that makes each of the program's values."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.made: dict[str, Step] = {}
        self.steps: list[Step] = []
        for name, value in lowered.program.values.items():
            if value.kind != "activation":
                self.made[name] = Step("placeholder", name, meta={"val": self._empty(value)})
                self.steps.append(self.made[name])
        for name, node in lowered.operators.items():
            if adds_and_norms(node) and node.outputs[-1] in lowered.values:
                self._apart(name, node)
                continue
            step = self._step(name, node)
            self.steps.append(step)
            for output in node.outputs:
                if output in lowered.values:
                    self.made[lowered.values[output].name] = step
        self._end()

    def _step(self, name: str, node: ir.Node) -> Step:
        given = [self._maker(self.lowered.operand(node, k)) for k in range(len(node.inputs))]
        inner = [self._maker(self.lowered.values.get(v)) for body in bodies(node) for v in body.outputs]
        step = Step("call_function", name, f"onnx.{_called(node)}", operator=node)
        step.all_input_nodes = list(dict.fromkeys(one for one in (*given, *inner) if one is not None))
        for one in step.all_input_nodes:
            one.users[step] = None
        step.kwargs = {"groups": _number(node, "group", 1), "dim": _number(node, "axis", -1)}
        names = _OPERANDS.get(node.op_type, ())
        step.kwargs |= dict(zip(names, given, strict=False)) if node.op_type != "Sum" or len(given) == 2 else {}
        outputs = [self.lowered.values.get(v) for v in node.outputs if v.name and (v.uses() or v.is_graph_output())]
        if len(outputs) == 1 and outputs[0] is not None:
            step.meta = {"val": self._transposed(step) if node.op_type == "Transpose" else self._empty(outputs[0])}
        return step

    def _apart(self, name: str, node: ir.Node) -> None:
        """Steps for the addition of the bias, that of the branch, and the norm, in place of one that is all that."""
        operands = [self.lowered.operand(node, k) for k in range(len(node.inputs))]
        sides, bias = [self._maker(value) for value in operands[:2]], bias_of(node)
        module, empty = self.lowered.values[node.outputs[0]].module, self._empty(self.lowered.values[node.outputs[-1]])
        inside = path_of(str(node.outputs[-1].name)) or module
        if bias is not None:
            side = branch_side(node)
            vector = self._maker(operands[SKIPS[node.op_type].bias])
            sides[side] = self._part(f"{name}_biased", "add", [sides[side], vector], (node, 0, inside, empty))
        whole = self.lowered.values[node.outputs[-1]].name
        added = self._part(whole, "add", sides, (node, 1, inside, empty))
        given = [self._maker(operands[k]) for k in SKIPS[node.op_type].given if k < len(operands)]
        normed = self._part(name, _called(node), [added, *given], (node, 2, module, empty))
        self.made[whole], self.made[name] = added, normed

    def _part(self, name: str, kind: str, given: list[Step | None], of: tuple[ir.Node, int, str, Any]) -> Step:
        node, part, module, empty = of
        step = Step("call_function", name, f"onnx.{kind}", operator=node, part=part)
        step.meta = {"val": empty, "module": module}
        step.all_input_nodes = list(dict.fromkeys(one for one in given if one is not None))
        for one in step.all_input_nodes:
            one.users[step] = None
        step.kwargs = {
            "groups": 1,
            "dim": -1,
            **(dict(zip(("self", "other"), given, strict=False)) if kind == "add" else {}),
        }
        self.steps.append(step)
        return step

    def _transposed(self, step: Step) -> Any:
        """What a transposition makes lies as its operand does: which dim is which can be told by that."""
        source = step.all_input_nodes[0].meta["val"] if step.all_input_nodes else ()
        if not isinstance(source, torch.Tensor) or step.operator is None:
            return ()
        return source.permute(*attribute(step.operator, "perm", range(source.ndim)[::-1]))

    def _maker(self, value: Value | None) -> Step | None:
        """What makes a value; a value that enters a loop's body comes from before the loop."""
        if value is None:
            return None
        return self.made.get(self.lowered.entering.get(value.name, value.name))

    def _empty(self, value: Value) -> Any:
        kind = self.lowered.kinds.get(value.name)
        return () if kind is None else torch.empty(value.shape, dtype=kind, device="meta")

    def _end(self) -> None:
        """What reads the outputs."""
        given = [self._maker(value) for value in self.lowered.program.outputs.values()]
        end = Step("output", "(outputs)")
        end.all_input_nodes = list(dict.fromkeys(one for one in given if one is not None))
        for one in end.all_input_nodes:
            one.users[end] = None
        self.steps.append(end)


def by_products(lowered: Lowered) -> set[str]:
    """Names, such as "output 1", of outputs that another output is computed from by operators that weigh it with weights."""
    program, steps = lowered.program, steps_of(lowered)
    maker = {value.name: step for step, value in _made(lowered, steps)}
    given = {lift: _behind(maker[value.name]) for lift, value in program.outputs.items() if value.name in maker}
    final = final_outputs(list(given.values()), _weighing(lowered, steps))  # type: ignore[arg-type]
    return {lift for lift, step in given.items() if step.name not in final}


def _behind(step: Step) -> Step:
    """The operator whose result a step only hands on under another name, or in another type."""
    while step.target in _HANDS_ON and step.all_input_nodes and step.all_input_nodes[0].op == "call_function":
        step = step.all_input_nodes[0]
    return step


def _made(lowered: Lowered, steps: list[Step]) -> Iterator[tuple[Step, Value]]:
    """Steps of operators with each value that they make."""
    for step in steps:
        node = lowered.operators.get(step.name)
        for value in node.outputs if node is not None and step.op == "call_function" else ():
            if value in lowered.values and (step.part is None or step.name == lowered.values[value].name):
                yield step, lowered.values[value]


def _weighing(lowered: Lowered, steps: list[Step]) -> set[Step]:
    """The operators that multiply what is computed from the inputs with what stored tensors alone give."""
    working = {work.op for work in lowered.program.relations.work}
    fixed: set[Step] = set()
    found: set[Step] = set()
    for step in steps:
        stored = step.op == "placeholder" and lowered.program.values[step.name].kind != "input"
        if stored or (step.all_input_nodes and all(one in fixed for one in step.all_input_nodes)):
            fixed.add(step)
        elif step.name in working and any(one in fixed for one in step.all_input_nodes):
            found.add(step)
    return found


def _called(node: ir.Node) -> str:
    if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].is_initializer():
        return "embedding"
    return _CALLED.get(node.op_type, node.op_type.lower())


def _number(node: ir.Node, name: str, otherwise: int) -> int:
    found = node.attributes.get(name)
    return int(found.value) if found is not None and found.type == ir.AttributeType.INT else otherwise
