"""Leaving branches and blocks out of a graph form: what is left goes on in their place, and what only they computed is taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from depgraph.cutting.bypassing import left_of
from depgraph.errors import CutError

if TYPE_CHECKING:
    from depgraph.plan import Plan

_COPY = torch.ops.aten.clone.default
Alike = Mapping[str, Node]


def alike(traced: Iterable[Node], module: GraphModule) -> Alike | None:
    """The nodes of a graph form by the names of those of the traced graph, which may have been captured at other sizes.

    None where the two don't compute the same, one operator after the other.
    """
    theirs, ours = _computing(traced), _computing(module.graph.nodes)
    if [n.target for n in theirs] != [n.target for n in ours]:
        return None
    found = {their.name: our for their, our in zip(theirs, ours, strict=True)}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    return found | {node.name: node for node in inputs}


def _computing(nodes: Iterable[Node]) -> list[Node]:
    """The nodes that make tensors, not sizes or nothing."""
    called = (node for node in nodes if node.op == "call_function")
    return [n for n in called if _has_tensors(n.meta.get("val", n.meta.get("example_value")))]


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or isinstance(value, (tuple, list)) and any(map(_has_tensors, value))


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
    doomed = set(gone)
    for node in module.graph.nodes:
        if node.op == "call_function" and doomed.intersection(node.all_input_nodes):
            doomed.add(node)
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
