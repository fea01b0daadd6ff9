"""A captured program that can be run on inputs of certain shapes, and what is to be known of it for that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.capture.exported import CapturedProgram, output_spec_of
from depgraph.consumers import Meeting, meetings
from depgraph.cutting.script import Script
from depgraph.graph import Program
from depgraph.operators import operator_name
from depgraph.origins import Origins
from depgraph.rules.domains import MOVES

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_FROM_ZERO = ("embedding", "embedding_bag")  # operators that take no index from behind


@dataclass(frozen=True)
class Runnable:
    """A capture for inputs of certain shapes; `same` says whether it has the nodes of the graph's own capture."""

    exported: CapturedProgram
    program: Program
    same: bool

    @cached_property
    def script(self) -> Script:
        """It as it is run."""
        return Script(self.exported)

    @cached_property
    def _behind(self) -> dict[tuple[frozenset[Node], frozenset[Node]], frozenset[Node]]:
        return {}

    def behind(self, nodes: frozenset[Node], shown: frozenset[Node]) -> frozenset[Node]:
        """`nodes` and all that must run for them, see `Script.behind`; found once."""
        if (nodes, shown) not in self._behind:
            self._behind[nodes, shown] = self.script.behind(nodes, shown)
        return self._behind[nodes, shown]

    @cached_property
    def meetings(self) -> list[Meeting]:
        """Its products, see `depgraph.consumers.meetings`."""
        return meetings(self.program, self.exported.graph.nodes)

    @cached_property
    def tables(self) -> dict[str, tuple[int, int]]:
        """The least index and the size of the tables that inputs point into as they are, by the names of these."""
        nodes = {node.name: node for node in self.exported.graph.nodes}
        found: dict[str, tuple[int, int]] = {}
        for dim, _, reason in self.program.relations.fixed:
            looking = nodes.get(reason.lift.removeprefix("index "))
            if looking is None or not reason.lift.startswith("index "):
                continue
            for given in self._pointing(looking, dim):
                while given.op == "call_function" and given.all_input_nodes[1:] == [] and _moves(given):
                    given = given.all_input_nodes[0]
                if given.op == "placeholder":
                    size = self.program.relations.sizes[dim]
                    least = 0 if operator_name(looking.target) in _FROM_ZERO else -size
                    before = found.get(given.name, (least, size))
                    found[given.name] = max(least, before[0]), min(size, before[1])
        return found

    def _pointing(self, looking: Node, dim: int) -> list[Node]:
        """What may point into a dim where an operator looks: of several indices, the one of this dim."""
        source, *others = (*looking.args, None)
        if not isinstance(source, Node) or not isinstance(others[0], (list, tuple)):
            return looking.all_input_nodes
        value = self.program.values.get(source.name)
        places = dict(zip(value.dims, others[0], strict=False)) if value is not None else {}
        index = places.get(dim)
        return [index] if isinstance(index, Node) else []

    @cached_property
    def inputs(self) -> list[str]:
        """The names of the leaves of what the model is called with, in the order of `pytree.tree_leaves((args, kwargs))`."""
        script = self.script
        return [n.name for n in script.nodes if n.op == "placeholder" and script.targets[n.name] is None]

    @cached_property
    def origins(self) -> Origins:
        """Which dims of inputs the dims of its values come from."""
        return Origins(self.program, self.inputs, [n for n in self.exported.graph.nodes if n.op == "call_function"])

    def structured(self, outputs: Iterable[torch.Tensor]) -> Any:
        """The tensors that a run gave, as the model returns them: a tensor, a tuple, a dict, an output class.

        After what it returns a program may give what its code decides by.
        """
        made = iter(outputs)
        (output,) = (node for node in self.exported.graph.nodes if node.op == "output")
        leaves = [next(made) if _is_tensor(leaf) else leaf for leaf in pytree.tree_leaves(output.args)]
        kinds = [spec.kind for spec in self.exported.graph_signature.output_specs]
        own = [leaf for leaf, kind in zip(leaves, kinds, strict=False) if kind is OutputKind.USER_OUTPUT]
        return pytree.tree_unflatten(own, output_spec_of(self.exported))

    @cached_property
    def nodes(self) -> dict[str, list[Meeting]]:
        """Its products by the operators that take them."""
        found: dict[str, list[Meeting]] = defaultdict(list)
        for meeting in self.meetings:
            found[meeting.op].append(meeting)
        return found


_OWN: WeakKeyDictionary[DependencyGraph, Runnable] = WeakKeyDictionary()


def own_of(graph: DependencyGraph) -> Runnable:
    """The capture that a graph was made of; the same each time."""
    if graph not in _OWN:
        _OWN[graph] = Runnable(graph.capture.exported, graph.capture.program, True)
    return _OWN[graph]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor)


def _moves(node: Node) -> bool:
    """Does a node with one operand leave its numbers what they are?"""
    return bool(node.all_input_nodes) and f"aten.{operator_name(node.target)}" in MOVES
