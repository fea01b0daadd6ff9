"""Leaving branches and blocks out of a graph form: what is left goes on in their place, and what only they computed is taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from depgraph.cutting.bypassing import left_of
from depgraph.errors import CutError
from depgraph.walks import ahead

if TYPE_CHECKING:
    from depgraph.plan import Plan

_COPY = torch.ops.aten.clone.default
Alike = Mapping[str, Node]


def alike(traced: Iterable[Node], module: GraphModule) -> Alike | None:
    """The nodes of a graph form by the names of those of the traced graph, which may have been captured at other sizes.

    What only passes on what it is given may be missing on either side, as captures leave it out where sizes are numbers: what
    it passes on stands for it then. None where the two don't compute the same, one operator after the other.
    """
    theirs, ours = _computing(traced), _computing(module.graph.nodes)
    found, at = {n.name: n for n in module.graph.nodes if n.op == "placeholder"}, 0
    for their in theirs:
        while at < len(ours) and _kind(ours[at]) != _kind(their) and not _idle(their) and _idle(ours[at]):
            at += 1
        if at < len(ours) and _kind(ours[at]) == _kind(their):
            found[their.name] = ours[at]
            at += 1
        elif not _idle(their):
            return None
        elif their.all_input_nodes[0].name in found:
            found[their.name] = found[their.all_input_nodes[0].name]
    return found if all(map(_idle, ours[at:])) else None


def _computing(nodes: Iterable[Node]) -> list[Node]:
    """The nodes that make tensors, not sizes or nothing."""
    return [node for node in nodes if node.op == "call_function" and has_tensors(node)]


def _kind(node: Node) -> tuple[Any, bool]:
    return node.target, _idle(node)


def _idle(node: Node) -> bool:
    """Does a node pass on all that it is given, as it is?"""
    if node.target in (torch.ops.aten.contiguous.default, torch.ops.aten.alias.default):
        return True
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    made, given = (n.meta.get("val") for n in (node, node.all_input_nodes[0]))
    sizes = zip(made.shape, given.shape, strict=True) if made is not None and given is not None else [(0, 1)]
    return all(statically_known_true(one == other) for one, other in sizes)


def has_tensors(node: Node) -> bool:
    """Does a node make a tensor, or several?"""
    return _are_tensors(node.meta.get("val", node.meta.get("example_value")))


def _are_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or isinstance(value, (tuple, list)) and any(map(_are_tensors, value))


def omit(plan: Plan, module: GraphModule, nodes: Alike) -> None:
    """Leave the plan's branches and blocks out of a graph form, and the tensors that only they read.

    `nodes` are its nodes as `alike` has them. Raises CutError where a size that is computed from what goes is used elsewhere.
    """
    left = left_of(plan.graph, plan.branches)
    for node, instead in left.instead.items():
        while instead in left.instead:
            instead = left.instead[instead]
        mine, passed = nodes[node.name], nodes[instead.name]
        if node in left.copied:
            with module.graph.inserting_after(mine):
                passed = module.graph.call_function(_COPY, (passed,))
        for user in [user for user in mine.users if user is not passed]:
            user.replace_input_with(mine, passed)
    tensors = plan.graph.left_out(plan.branches).parameters
    _erase(module, {nodes[name] for name in left.gone if name in nodes}, tensors)
    _drop(module, tensors)


def _erase(module: GraphModule, gone: set[Node], tensors: frozenset[str]) -> None:
    """Take nodes out, with the checks and sizes that are computed from them, and these tensors."""
    doomed = ahead(
        (node for node in module.graph.nodes if node.op == "call_function" or node in gone), gone.__contains__
    )
    for node in reversed(list(module.graph.nodes)):
        if node in doomed:
            if node.users:
                raise CutError(f"{node.name}, which goes, is read by {next(iter(node.users)).name}, which stays")
            module.graph.erase_node(node)
    for node in reversed(list(module.graph.nodes)):
        if node.op == "get_attr" and node.target in tensors and not node.users:
            module.graph.erase_node(node)


def _drop(module: GraphModule, names: Iterable[str]) -> None:
    """Let go of tensors that nothing reads, and of the modules that held nothing else."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in names:
        path, _, last = name.rpartition(".")
        holder = _held(module, path)
        if name in read or holder is None:
            continue
        holder._parameters.pop(last, None)
        holder._buffers.pop(last, None)
        while path and (holder := _held(module, path)) is not None and _is_empty(holder):
            path, _, last = path.rpartition(".")
            module.get_submodule(path)._modules.pop(last)


def _held(module: nn.Module, path: str) -> nn.Module | None:
    return dict(module.named_modules()).get(path)


def _is_empty(module: nn.Module) -> bool:
    stores: tuple[Callable[[], Iterable[Any]], ...] = (module.parameters, module.buffers, module.children)
    return not any(True for store in stores for _ in store())
