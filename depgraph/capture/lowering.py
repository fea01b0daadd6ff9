"""From an exported program to values and relations: every operator is looked up in the table of rules."""

from __future__ import annotations

import operator
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from depgraph import rules
from depgraph.capture import asking
from depgraph.capture.exported import CapturedProgram, decisions_of
from depgraph.capture.holding import Held
from depgraph.capture.places import module_path, place
from depgraph.capture.reading import indices_read
from depgraph.capture.values_read import empty, values_read
from depgraph.capture.views import in_rows
from depgraph.errors import CaptureError
from depgraph.graph import Least, Program, Reason, Value
from depgraph.operators import is_pointwise
from depgraph.rules import domains

_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}
_LARGEST_INDEX_TABLE = 1 << 20
INPUT, OUTPUT = "the model's inputs have this size", "the model's outputs have this size"
UNREAD = "nothing that the example runs reads it"
GIVEN = "the model gives back its indices as numbers"
LEFT_OUT = "slices leave it out, which may differ with inputs of other sizes"


def lower(exported: CapturedProgram, strict: bool = False, held: Held | None = None) -> Program:
    """Lower a captured program. With `strict`, an operator without a rule raises UnsupportedOperator.

    Tied parameters have the same dims; what nothing reads has those of its like, as far as `held` knows any.
    """
    return _Lowering(exported, strict, held or Held()).run()


def lower_also(program: Program, exported: CapturedProgram, held: Held) -> bool:
    """Let what another program of the same model says about dims hold in `program` too, and what it reads be read.

    False, with `program` half changed, where it has operators without a rule.
    """
    lowering = _Lowering(exported, False, held)
    stored = {v.target: v for v in program.values.values() if v.kind in ("parameter", "buffer") and v.target}
    lowering.program.relations = program.relations
    lowering.first_of = {program.ties.get(target, target): value for target, value in reversed(stored.items())}
    contractions, work = program.relations.contractions, program.relations.work
    program.relations.contractions, program.relations.work = [], []
    try:
        also = lowering.run()
    finally:
        program.relations.contractions, program.relations.work = contractions, work
    for value in also.values.values():
        if value.used and value.target in stored:
            stored[value.target].used = True
    return not also.unknown


def relate_kin(program: Program, kin: Mapping[str, str]) -> None:
    """What the example passed by has the dims of its like in the same list or dict of modules; other dims of it stay."""
    held = [v for v in program.values.values() if v.kind in ("parameter", "buffer") and v.target in kin]
    read: dict[tuple[str, int], list[Value]] = {}
    for value in held:
        if value.used:
            read.setdefault((kin[value.target], len(value.shape)), []).append(value)
    reason = Reason("the traced forward doesn't read it", why=UNREAD)
    for value in held:
        like = read.get((kin[value.target], len(value.shape)), [])
        if value.used or not like:
            continue
        value.used = True
        nearest = max(like, key=lambda one: sum(a == b for a, b in zip(one.shape, value.shape, strict=True)))
        for d, size in enumerate(value.shape):
            if nearest.shape[d] == size:
                program.relations.align(value.dim(d), nearest.dim(d))
            else:
                program.relations.fix(value.dim(d), reason)


class _Lowering:
    def __init__(self, exported: CapturedProgram, strict: bool, held: Held) -> None:
        self.exported = exported
        self.first_of: dict[str, Value] = {}
        self.strict = strict
        self.kin = held.kin
        self.program = Program(ties=dict(held.ties))
        self.constants: dict[str, np.ndarray] = {}
        self.tuples: dict[str, list[Value | None]] = {}
        self.chosen: asking.Chosen = {}
        decisions, asked = decisions_of(exported), [asked.node for asked in asking.all_asked(exported)]
        unsettled = decisions is not None and not decisions.settled
        self.read = values_read(exported.graph.nodes, [*asked, *(empty(exported.graph.nodes) if unsettled else ())])

    def run(self) -> Program:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        self.chosen = asking.chosen(self.exported, self.program.relations)
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name])
            elif node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                self._call(node)
        asking.relate(self.exported, self.program, self.chosen)
        self._outputs()
        self._left_out()
        relate_kin(self.program, self.kin)
        return self.program

    def _left_out(self) -> None:
        """Fix the indices that only slices leave out, of what the model holds: a longer input may read them."""
        held = [v for v in self.program.values.values() if v.kind in ("parameter", "buffer") and v.target and v.used]
        nodes = {node.name: node for node in self.exported.graph.nodes}
        read: dict[tuple[str, int], np.ndarray] = {}
        for value in held:
            for d, seen in enumerate(indices_read(nodes[value.name])):
                key = self.program.ties.get(value.target, value.target), d
                read[key] = read.get(key, False) | seen
        for value in held:
            reason = Reason(f"no slice of {value.target!r} that the traced forward takes holds it", why=LEFT_OUT)
            for d in range(len(value.shape)):
                left = np.flatnonzero(~read[self.program.ties.get(value.target, value.target), d])
                if len(left):
                    self.program.relations.fix(value.dim(d), reason, left)

    def _placeholder(self, node: Node, spec: Any) -> None:
        tensor = node.meta.get("val")
        if not isinstance(tensor, torch.Tensor):
            return
        kind = _KINDS.get(spec.kind, "constant")
        value = self._value(node, kind, tensor, target=spec.target or "", used=bool(node.users))
        first = (
            self.first_of.setdefault(self.program.ties.get(value.target, value.target), value)
            if value.target
            else value
        )
        for mine, theirs in zip(value.dims, first.dims, strict=True):
            self.program.relations.align(mine, theirs)
        if kind == "input":
            for d, dim in enumerate(value.dims):
                self.program.relations.fix(dim, Reason(f"dimension {d} of the model's input {node.name!r}", why=INPUT))
        elif not tensor.dtype.is_floating_point:
            self._remember(node.name, spec.target)
        if node.name in self.chosen:
            value.domain = self.chosen[node.name].domain

    def _constant(self, node: Node) -> None:
        tensor = node.meta.get("val")
        if isinstance(tensor, torch.Tensor):
            self._value(node, "constant", tensor, target=str(node.target))

    def _remember(self, name: str, target: str | None) -> None:
        tensor = self.exported.constants.get(target or "", self.exported.state_dict.get(target or ""))
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel() <= _LARGEST_INDEX_TABLE:
            self.constants[name] = tensor.detach().numpy()

    def _value(self, node: Node, kind: Any, tensor: torch.Tensor, *, name: str = "", **more: Any) -> Value:
        shape = tuple(concrete(s, node) for s in tensor.shape)
        return self.program.add(name or node.name, kind, shape, itemsize=tensor.dtype.itemsize, **more)

    def _call(self, node: Node) -> None:
        if node.target is operator.getitem:
            self._item(node)
            return
        results = node.meta.get("val")
        many = isinstance(results, (tuple, list))
        listed: list[Any] = list(results) if isinstance(results, (tuple, list)) else [results]
        outputs: list[Value | None] = []
        for k, tensor in enumerate(listed):
            name = f"{node.name}:{k}" if many else node.name
            is_tensor = isinstance(tensor, torch.Tensor)
            found = {"name": name, "module": module_path(node)}
            outputs.append(self._value(node, "activation", tensor, **found) if is_tensor else None)
        op = op_of(node, self)
        if many:
            self.tuples[node.name] = outputs
            read = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
            op.unread = frozenset(range(len(listed))) - read
        op.outputs = [value for value in outputs if value is not None]
        self._apply(op, node)

    def _item(self, node: Node) -> None:
        source, key = node.args
        if isinstance(source, Node) and source.name in self.tuples and isinstance(key, int):
            value = self.tuples[source.name][key]
            if value is not None:
                self.program.values[node.name] = value

    def _apply(self, op: rules.Op, node: Node) -> None:
        function = rules.lookup(op.target)
        if function is None and is_pointwise(node.target):
            function = rules.lookup("aten.where")
        if function is not None:
            before = len(self.program.relations.fixed), len(self.program.relations.mixed)
            try:
                function(op)
            except ValueError as error:
                op.leave_alone(error)
                before = len(self.program.relations.fixed), len(self.program.relations.mixed)
            domains.follow(op)
            if node not in self.read:
                self._only_shape(op, before)
            return
        if not op.inputs and not op.outputs:  # it computes with numbers
            return
        if self.strict:
            raise op.no_rule()
        op.leave_alone()
        domains.follow(op)

    def _only_shape(self, op: rules.Op, before: tuple[int, int]) -> None:
        """An operator whose numbers nothing reads fixes and mixes nothing; what it picks by its position must be there.

        That is where each dim of its result is one of its operands': others are computed from what it fixes, as by a kernel.
        """
        relations = self.program.relations
        given = {relations.find(dim) for value in op.inputs for dim in value.dims}
        if any(relations.find(dim) not in given for value in op.outputs for dim in value.dims):
            return
        del relations.fixed[before[0] :]
        del relations.mixed[before[1] :]
        index = op.get("index") if op.target.startswith("aten.select.") else None
        if isinstance(index, int) and index:
            count = index + 1 if index > 0 else -index
            reason = op.reason(f"index {index} of it is looked at, for its shape")
            relations.least.append(Least(op.inputs[0].dim(op["dim"]), count, reason))

    def _weighing(self) -> set[Node]:
        """The operators that multiply what is computed from the inputs with what parameters alone give."""
        values, working = self.program.values, {work.op for work in self.program.relations.work}
        fixed: set[Node] = set()
        found: set[Node] = set()
        for node in self.exported.graph.nodes:
            parents = node.all_input_nodes
            stored = node.op == "placeholder" and values[node.name].kind != "input" if node.name in values else False
            if stored or (parents and all(parent in fixed for parent in parents)):
                fixed.add(node)
            elif node.name in working and any(parent in fixed for parent in parents):
                found.add(node)
        return found

    def _outputs(self) -> None:
        """Fix what the model gives back, by name, and know what it only shows on the way to another output."""
        relations = self.program.relations
        by_name = {node.name: node for node in self.exported.graph.nodes}
        names = [spec.arg.name for spec in self.exported.graph_signature.output_specs if hasattr(spec.arg, "name")]
        final = final_outputs([by_name[name] for name in names if name in by_name], self._weighing())
        for position, name in enumerate(names):
            value, lift = self.program.values.get(name), f"output {position}"
            if value is None:
                continue
            self.program.outputs[lift] = value
            if name not in final:
                self.program.by_products.add(lift)
            for d, dim in enumerate(value.dims):
                text = f"dimension {d} of the model's output {position} ({name})"
                relations.fix(dim, Reason(text, lift, OUTPUT))
            if value.domain is not None:
                text = f"the model's output {position} ({name}) gives its indices"
                relations.fix(value.domain, Reason(text, why=GIVEN))


def concrete(size: int | torch.SymInt, node: Node) -> int:
    """A size as a number: that of the example inputs where it is symbolic. `node` is what has it or asks for it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is None:
        where = place(node)
        raise CaptureError(
            f"a size depends on the values of a tensor{f' at {where}' if where else ''} ({node.target}): "
            "write that with torch.where and sizes known beforehand, or take it out of the forward"
        )
    return int(size.node.hint)


def final_outputs(outputs: list[Node], weighing: set[Node]) -> set[str]:
    """Names of the outputs that no other output is computed from by operators that weigh it with parameters, and of the first.

    Hidden states behind logits aren't final; logits beside their entropy, or beside a loss, are: no weight would go with them.
    The first output is what a model is for, whatever else it computes from it (a pooled one, say).
    """
    chosen = {node.name for node in outputs}
    inner: set[str] = set()
    seen: set[tuple[Node, bool]] = set()
    queue = [(node, False) for node in outputs]
    while queue:
        node, weighed = queue.pop()
        if (node, weighed) in seen:
            continue
        seen.add((node, weighed))
        if weighed and node.name in chosen:
            inner.add(node.name)
        queue.extend((parent, weighed or node in weighing) for parent in node.all_input_nodes)
    return chosen - inner | {node.name for node in outputs[:1]}


def op_of(node: Node, lowering: _Lowering) -> rules.Op:
    """The operator of a node with its arguments by schema name, defaults filled in."""

    def convert(argument: Any) -> Any:
        if isinstance(argument, Node):
            made = argument.meta.get("val")
            return (
                concrete(made, argument)
                if isinstance(made, torch.SymInt)
                else lowering.program.values.get(argument.name)
            )
        if isinstance(argument, (list, tuple)):
            return [convert(item) for item in argument]
        return argument

    schema = getattr(node.target, "_schema", None)
    arguments: dict[str, Any] = {}
    if schema is None:
        arguments = {str(k): convert(a) for k, a in enumerate(node.args)}
        arguments.update({k: convert(a) for k, a in node.kwargs.items()})
    else:
        for k, declared in enumerate(schema.arguments):
            given = node.args[k] if k < len(node.args) else node.kwargs.get(declared.name, declared.default_value)
            arguments[declared.name] = convert(given)
    op = rules.Op(node.name, _name(node), arguments, [], lowering.program, place(node), lowering.constants)
    if op.target.startswith("aten.view_as_complex"):
        op.rows = [
            lowering.program.values[n.name]
            for n in in_rows(node.all_input_nodes[0])
            if n.name in lowering.program.values
        ]
    return op


def _name(node: Node) -> str:
    """What an operator is called; a function of Python by the package that it is from."""
    if isinstance(node.target, types.FunctionType):
        return f"{node.target.__module__.split('.')[0]}.{node.target.__name__}"
    return str(node.target)
