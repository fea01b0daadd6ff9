"""torch.export sets code under another gradient mode apart, in a graph of its own: here it is taken back into the one graph.

What a gradient is there is written out by then, so that the graph computes the same in any mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

_SET_APART = torch.ops.higher_order.wrap_with_set_grad_enabled


def inlined(program: ExportedProgram) -> ExportedProgram:
    """The same program, with what it had set apart in its graph."""
    whole = program.graph_module
    while apart := [node for node in whole.graph.nodes if node.target is _SET_APART]:
        for node in apart:
            _inline(whole, node)
    whole.recompile()
    return program


def _inline(whole: GraphModule, node: Node) -> None:
    held: Any = node.args[1]
    part = getattr(whole, held.target)
    places = (inner for inner in part.graph.nodes if inner.op == "placeholder")
    copies: dict[Node, Any] = dict(zip(places, node.args[2:], strict=True))
    with whole.graph.inserting_before(node):
        results: Any = whole.graph.graph_copy(part.graph, copies)
    for inner, copy in copies.items():
        if inner.op == "get_attr":  # a part of this part
            copy.target = f"{held.target}_{inner.target}"
            setattr(whole, copy.target, getattr(part, str(inner.target)))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # what is set apart gives several results, and each is picked
        whole.graph.erase_node(user)
    whole.graph.erase_node(node)
    if not held.users:
        whole.graph.erase_node(held)
