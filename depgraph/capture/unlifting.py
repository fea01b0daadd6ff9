"""A directly captured program as a torch.fx.GraphModule that holds the model's tensors and is called like the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from depgraph.capture.exported import DirectProgram
from depgraph.capture.reserved_names import apart_in


def module_of(program: DirectProgram, tensors: Mapping[str, torch.Tensor], inputs: Any) -> GraphModule:
    """The program with `tensors` (by name) inside, for arguments such as `inputs` (positional, by name)."""
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    names_there = apart_in(program.graph_signature)
    root, graph, copies = nn.Module(), Graph(), dict[Node, Node]()
    for node in program.graph.nodes:
        target = targets.get(node.name) if node.op == "placeholder" else None
        if target is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        there = names_there.there(target)
        _hold(root, there, tensors.get(target, program.constants.get(target)))
        copies[node] = graph.get_attr(there)
        copies[node].meta = dict(node.meta)
    args, kwargs = inputs
    names = [*(f"arg_{position}" for position in range(len(args))), *kwargs]
    _, given = pytree.tree_flatten((tuple(args), dict(kwargs)))
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, given, program.output_spec)))
    return GraphModule(root, graph)


def _hold(root: nn.Module, target: str, tensor: Any) -> None:
    """Put a tensor where its name says, as the kind of attribute that it is."""
    *path, last = target.split(".")
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor)
