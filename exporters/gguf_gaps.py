"""A captured model as weight matrices with gaps between them, and what each gap computes, by trying.

A matrix is where data meets a weight of two dims; what lies between two of them (a norm, an attention, an activation) is a
function of tensors, which can be run on any values. So what a part of a model is can be told by what it does, whatever it is
called and however it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from depgraph.errors import ExportError
from depgraph.walks import reached

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_aten = torch.ops.aten

_PRODUCTS: dict[Any, tuple[int, int, int | None, bool]] = {
    _aten.linear.default: (0, 1, 2, False),
    _aten.mm.default: (0, 1, None, True),
    _aten.matmul.default: (0, 1, None, True),
    _aten.addmm.default: (1, 2, 0, True),
}
"""Of each product: where its data, its weight and its bias stand, and whether the weight is [in, out]."""


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] where it meets data: `data` is the node that it reads, `node` the one it gives.

    `name` is the parameter that it is, or the node where there is no such parameter.
    """

    node: Node
    data: Node
    weight: Tensor
    bias: Tensor | None
    name: str


class Gaps:
    """The matrices of a traced model in order of execution, and what is computed between them.

    `table` is the matrix [rows, width] that the ids look rows up in; its node is the embedding.
    """

    def __init__(self, graph: DependencyGraph) -> None:
        self._program = graph.capture.exported
        self._nodes = list(self._program.graph.nodes)
        self._held = self._placeholders(graph)
        self._constants: dict[Node, Any] = {}
        self.table = self._find_table(graph.name)
        self._moving = _from(self.table.node)
        self.matrices = [m for node in self._nodes if (m := self._matrix(node)) is not None]
        self._stops = {self.table.node, *(m.node for m in self.matrices)}
        self._sources = self._all_sources()

    def sources(self, node: Node) -> frozenset[Node]:
        """The embedding and the matrices that a value is computed from with no matrix between."""
        return self._sources[node]

    def _all_sources(self) -> dict[Node, frozenset[Node]]:
        found: dict[Node, frozenset[Node]] = {}
        for node in self._nodes:
            given = (found[n] for n in node.all_input_nodes if n in self._moving)
            found[node] = frozenset([node]) if node in self._stops else frozenset().union(*given)
        return found

    def run(self, wanted: Node, given: Mapping[Node, Tensor]) -> Tensor:
        """The value of a node where those in `given` have these values; what depends on none has that of the example."""
        needed = self._between(wanted, given)
        values: dict[Node, Any] = dict(given)
        for node in needed:
            values[node] = self._computed(node, values)
        made: Tensor = values[wanted] if wanted in values else self._constant(wanted)
        return made

    def output(self) -> Node:
        """The node of the model's first output that data reaches."""
        (output,) = (node for node in self._nodes if node.op == "output")
        return next(node for node in output.all_input_nodes if node in self._moving)

    def alone(self, source: Node, others: Iterable[Node]) -> Node:
        """The last value on the way from `source` that `others` have no part in."""
        mine, theirs = _from(source), set().union(*map(_from, others))
        return [node for node in self._nodes if node in mine and node not in theirs and _meets(node, theirs)][-1]

    def vectors(self, wanted: Node, given: Iterable[Node], size: int) -> list[Tensor]:
        """The constants of one dim and this size that a node is computed with."""
        between = self._between(wanted, dict.fromkeys(given))
        held = {n for node in between for n in node.all_input_nodes if n not in self._moving and isinstance(n, Node)}
        values = [self._constant(n) for n in held]
        return [v for v in values if isinstance(v, Tensor) and v.shape == (size,)]

    def _between(self, wanted: Node, given: Mapping[Node, Any]) -> list[Node]:
        def followed(nodes: Iterable[Node]) -> list[Node]:
            return [node for node in nodes if node in self._moving and node not in given]

        needed = reached(followed([wanted]), lambda node: followed(node.all_input_nodes))
        return [node for node in self._nodes if node in needed]

    def _computed(self, node: Node, values: dict[Node, Any]) -> Any:
        def fetched(n: Node) -> Any:
            return values[n] if n in values else self._constant(n)

        if node.op != "call_function":
            return self._held[node]
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), fetched)
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        return target(*args, **kwargs)

    def _constant(self, node: Node) -> Any:
        """The value of a node that no data reaches, or of all that the example gives it."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in top.all_input_nodes if n not in self._constants]
            if top in self._constants or missing:
                stack.extend(missing) if top not in self._constants else stack.pop()
                continue
            self._constants[stack.pop()] = self._computed(top, self._constants)
        return self._constants[node]

    def _placeholders(self, graph: DependencyGraph) -> dict[Node, Any]:
        tensors, signature = graph.tensors(), self._program.graph_signature
        targets = {spec.arg.name: spec.target for spec in signature.input_specs}
        own = iter(torch.utils._pytree.tree_leaves((graph.args, graph.kwargs)))
        held: dict[Node, Any] = {}
        for node in (n for n in self._nodes if n.op == "placeholder"):
            target = targets[node.name]
            if target is None:
                held[node] = next(own)
            else:
                held[node] = tensors[target] if target in tensors else self._program.constants[target]
        self._targets = {node: targets[node.name] for node in held}
        return held

    def _find_table(self, owner: str) -> Matrix:
        for node in self._nodes:
            if node.target is _aten.embedding.default and node.args[0] in self._held:
                weight: Any = node.args[0]
                return Matrix(node, node.args[1], self._held[weight].detach(), None, str(self._targets[weight]))
        raise ExportError(f"GGUF holds language models, but {owner} looks nothing up in an embedding.")

    def _matrix(self, node: Node) -> Matrix | None:
        places = _PRODUCTS.get(node.target)
        if places is None or node not in self._moving:
            return None
        data, weight, bias, turned = places
        held: Any = node.args[weight]
        if node.args[data] not in self._moving or held in self._moving:
            return None
        value = self._constant(held).detach()
        if value.dim() != 2:
            return None
        added: Any = node.args[bias] if bias is not None and len(node.args) > bias else None
        name = next((str(self._targets[n]) for n in (held, *held.all_input_nodes) if n in self._held), node.name)
        return Matrix(
            node,
            node.args[data],  # type: ignore[arg-type]
            value.T if turned else value,
            None if added is None else self._constant(added).detach(),
            name,
        )


def _from(source: Node) -> set[Node]:
    """A node and all that is computed from it."""
    return set(reached([source], lambda node: node.users))


def shape_of(node: Node) -> tuple[int, ...]:
    """The sizes of a node's value at the example."""
    return tuple(int(size) for size in node.meta["val"].shape)


def _meets(node: Node, others: set[Node]) -> bool:
    return any(user in others for user in node.users)
