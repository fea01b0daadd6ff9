"""A captured program as it is run: what is the same each time, found once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph.capture.exported import CapturedProgram
from depgraph.cutting.cheaper import cheaper
from depgraph.cutting.draws import may_draw
from depgraph.cutting.mutating import writes
from depgraph.operators import operator_name
from depgraph.walks import behind

_HOLDERS = (tuple, list, dict, slice)
_ROWS = {"linear": 0, "mm": 0, "matmul": 0, "addmm": 1}  # products, and which operand is taken row by row


class Script:
    """The nodes of a captured program in order, and what is to be known of each before it runs.

    `targets`: for placeholders, the name of what the model holds, None for inputs. `writes` and their `roots`, the nodes of the
    memory that is written to. `drawing`: operators that may draw random numbers. `rows`: products, by the operand of which each row
    is taken for itself. `cheaper`: what is called in the place of operators. `plain`: operators that are given nothing within a
    list or the like. `dead`: what can be let go after a node. `first`: what the model holds, by the node that uses it first, as few as
    possible are to be here at a time; not what is written to. `late` are all those.
    """

    def __init__(self, exported: CapturedProgram) -> None:
        self.exported = exported
        self.nodes: list[Node] = list(exported.graph.nodes)
        self.targets: dict[str, str | None] = {s.arg.name: s.target for s in exported.graph_signature.input_specs}
        self.writes = writes(self.nodes)
        self.roots = frozenset(write.root for write in self.writes)

    @cached_property
    def written_through(self) -> Mapping[Node, list[Node]]:
        """Of operators in place, the views that they write through, from the inner one out."""
        return {write.writer: list(write.views[:-1]) for write in self.writes if len(write.views) > 1}

    @cached_property
    def drawing(self) -> frozenset[Node]:
        return frozenset(node for node in self.nodes if may_draw(node))

    @cached_property
    def rows(self) -> Mapping[Node, int]:
        found = {node: _ROWS.get(operator_name(node.target)) for node in self.nodes if node.op == "call_function"}
        return {node: at for node, at in found.items() if at is not None}

    @cached_property
    def cheaper(self) -> Mapping[Node, Callable[..., Any]]:
        return cheaper(self.nodes)

    @cached_property
    def plain(self) -> frozenset[Node]:
        return frozenset(node for node in self.nodes if node.op == "call_function" and _is_plain(node))

    @cached_property
    def dead(self) -> Mapping[Node, list[Node]]:
        last = {parent: node for node in self.nodes for parent in node.all_input_nodes}
        return _by(last.items())

    @cached_property
    def first(self) -> Mapping[Node, list[Node]]:
        first: dict[Node, Node] = {}
        for node in self.nodes:
            for parent in node.all_input_nodes:
                if parent in self.late:
                    first.setdefault(parent, node)
        return _by(first.items())

    @cached_property
    def late(self) -> frozenset[Node]:
        held = (n for n in self.nodes if n.op == "placeholder" and self.targets[n.name] is not None)
        return frozenset(held) - self.roots

    def behind(self, nodes: frozenset[Node], shown: frozenset[Node]) -> frozenset[Node]:
        """`nodes` and all that is computed for them; with what writes to memory, draws or asserts before the last of `shown`."""
        last = max((k for k, node in enumerate(self.nodes) if node in shown), default=-1)
        writers = {write.writer for write in self.writes}
        before = (node for node in self.nodes[: last + 1] if node.op == "call_function")
        return frozenset(behind([*nodes, *(n for n in before if n in writers or n in self.drawing or n.is_impure())]))

    @cached_property
    def outputs(self) -> list[Node]:
        (output,) = (node for node in self.nodes if node.op == "output")
        return [leaf for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, Node)]


def _is_plain(node: Node) -> bool:
    """Is all that a node takes from others an argument of its own?"""
    found: list[Node] = []
    for given in (*node.args, *node.kwargs.values()):
        if isinstance(given, _HOLDERS):
            map_arg(given, found.append)
    return not found


def _by(pairs: Iterable[tuple[Node, Node]]) -> dict[Node, list[Node]]:
    """The first of each pair by the second."""
    found: dict[Node, list[Node]] = {}
    for one, other in pairs:
        found.setdefault(other, []).append(one)
    return found
