"""An ONNX model's operators as `depgraph.layers` reads a graph: steps that have names, operands and users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from depgraph.capture.lowering import final_outputs
from depgraph.graph import Value

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
    "SkipLayerNormalization": "add",
    "SkipSimplifiedLayerNormalization": "add",
    "EmbedLayerNormalization": "embedding",
}
"""What operators are called in words about axes, where that isn't their name in lower case."""
_ATTENDS = frozenset(["Attention", "MultiHeadAttention", "GroupQueryAttention"])


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

    @property
    def meta(self) -> dict[str, Any]:
        """Every step makes tensors."""
        return {"val": ()}


def steps_of(lowered: Lowered) -> list[Step]:
    """All steps in the order of execution."""
    made: dict[str, Step] = {}
    found: list[Step] = []
    for name, value in lowered.program.values.items():
        if value.kind != "activation":
            made[name] = Step("placeholder", name)
            found.append(made[name])
    for name, node in lowered.operators.items():
        step = _step(lowered, name, node, made)
        found.append(step)
        for output in node.outputs:
            seen = lowered.values.get(output)
            if seen is not None:
                made[seen.name] = step
    return found


def by_products(lowered: Lowered) -> set[str]:
    """Names, such as "output 1", of outputs that another output is computed from by operators that weigh it with weights."""
    program, steps = lowered.program, steps_of(lowered)
    maker = {value.name: step for step, value in _made(lowered, steps)}
    given = {lift: maker[value.name] for lift, value in program.outputs.items() if value.name in maker}
    final = final_outputs(list(given.values()), _weighing(lowered, steps))  # type: ignore[arg-type]
    return {lift for lift, step in given.items() if step.name not in final}


def _made(lowered: Lowered, steps: list[Step]) -> Iterator[tuple[Step, Value]]:
    """Steps of operators with each value that they make."""
    for step in steps:
        node = lowered.operators.get(step.name)
        for value in node.outputs if node is not None and step.op == "call_function" else ():
            if value in lowered.values:
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


def _step(lowered: Lowered, name: str, node: ir.Node, made: dict[str, Step]) -> Step:
    operands = [lowered.operand(node, k) for k in range(len(node.inputs))]
    given = [None if v is None else made.get(v.name) for v in operands]
    step = Step("call_function", name, f"onnx.{_called(node)}", operator=node)
    step.all_input_nodes = list(dict.fromkeys(one for one in given if one is not None))
    for one in step.all_input_nodes:
        one.users[step] = None
    step.kwargs = {"groups": _number(node, "group", 1), "dim": _number(node, "axis", -1)}
    if node.op_type in _ATTENDS:
        step.kwargs |= dict(zip(("query", "key", "value"), given, strict=False))
    return step


def _called(node: ir.Node) -> str:
    if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].is_initializer():
        return "embedding"
    return _CALLED.get(node.op_type, node.op_type.lower())


def _number(node: ir.Node, name: str, otherwise: int) -> int:
    found = node.attributes.get(name)
    return int(found.value) if found is not None and found.type == ir.AttributeType.INT else otherwise
