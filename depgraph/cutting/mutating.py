"""Operators that write into a tensor they are given, and whose memory that is."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from depgraph.capture.exported import CapturedProgram
from depgraph.capture.keeping import written_arguments

_index_copy = torch.ops.aten.index_copy_.default
_MUTATIONS = {OutputKind.BUFFER_MUTATION, getattr(OutputKind, "PARAMETER_MUTATION", None)}


class Write(NamedTuple):
    """An operator in place, and what it writes to: a view, what that is a view of, and so on; at last the node that made the memory."""

    writer: Node
    views: tuple[Node, ...]

    @property
    def root(self) -> Node:
        return self.views[-1]


def writes(nodes: Iterable[Node]) -> list[Write]:
    """All writes of a captured graph."""
    return [Write(node, tuple(_bases(target))) for node in nodes for target in written_by(node)]


def written_targets(exported: CapturedProgram) -> set[str]:
    """Names of the parameters, buffers and constants that a captured program writes to."""
    signature = exported.graph_signature
    names = {spec.arg.name: spec.target for spec in signature.input_specs}
    found = {names.get(write.root.name) for write in writes(exported.graph.nodes)}
    found |= {spec.target for spec in signature.output_specs if spec.kind in _MUTATIONS}
    return {name for name in found if name}


def write_without_gradients(module: GraphModule) -> None:
    """Let writes to parameters take no part in gradients: torch allows no other, and a capture doesn't say so."""
    held = dict(module.named_parameters(remove_duplicate=False))
    for write in writes(list(module.graph.nodes)):
        writer, root = write.writer, write.root
        if root.op != "get_attr" or root.target not in held:
            continue
        if _schema_of(writer).is_mutable:
            writer.replace_all_uses_with(next(written_by(writer)))
        with module.graph.inserting_before(writer):
            writer.args, writer.kwargs = map_arg((writer.args, writer.kwargs), _detached)


def write_back(module: GraphModule, copies: Iterable[Node]) -> None:
    """Let what is written to `copies`, index_select in the place of views, reach what these were taken from."""
    known = set(copies)
    for writer in list(module.graph.nodes) if known else ():
        after: Node = writer
        for copy in [copy for target in written_by(writer) for copy in _through(target, known)]:
            with module.graph.inserting_after(after):
                after = module.graph.call_function(_index_copy, (*copy.args, copy))


def _through(target: Node, copies: set[Node]) -> Iterator[Node]:
    """The copies in the place of views through which a write to `target` goes, from the inner one out."""
    node: Node | None = target
    while node is not None:
        if node in copies:
            yield node
        node = node.args[0] if node in copies else base_of(node)  # type: ignore[assignment]


def _detached(node: Node) -> Node:
    made = node.meta.get("val")
    if node.op != "get_attr" and not isinstance(made, torch.Tensor):
        return node
    return node.graph.call_function(torch.ops.aten.detach.default, (node,))


def written_by(node: Node) -> Iterator[Node]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for given in written_arguments(node.target, node.args, node.kwargs):
        yield from (one for one in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(one, Node))


def _schema_of(node: Node) -> Any:
    return getattr(node.target, "_schema", None)


def memory_of(node: Node) -> Node:
    """The node that made the memory of what `node` made."""
    *_, root = _bases(node)
    return root


def _bases(node: Node) -> Iterator[Node]:
    """A node, what it is a view of, what that is a view of, and so on."""
    yield node
    while (base := base_of(node)) is not None:
        yield base
        node = base


def base_of(node: Node) -> Node | None:
    """What `node` is a view of, as far as its operator says; None where it makes memory of its own."""
    if node.target is operator.getitem:
        first: Any = node.args[0]
        return first if isinstance(first, Node) else None
    schema = _schema_of(node)
    if schema is None or not any(made.alias_info is not None for made in schema.returns):
        return None
    return next((n for n in node.args if isinstance(n, Node)), None)
