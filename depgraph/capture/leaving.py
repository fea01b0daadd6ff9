"""What a captured forward leaves outside of its model: tables in a cache of a function, in a class, in a module of Python.

While a model is captured directly, tensors have no data. The code may keep some where no one can put back what was there, and
would find them when it runs next. So they are given their data, as if the model had run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph.capture.exported import DirectProgram
from depgraph.capture.keeping import unwritten
from depgraph.capture.proxies import held_by_torch
from depgraph.operators import writes
from depgraph.walks import behind


def fill_what_is_left(
    program: DirectProgram, model: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
) -> None:
    """Tensors that the code was given during the capture, and that it kept, get the values that they stand for."""
    left = _kept_by_the_code(program)
    program.given.clear()
    if left and not any(parameter.is_meta for parameter in model.parameters()):
        values = _values(program, model, inputs, {node for _, node in left})
        shapes = {id(tensor): tensor.detach() for tensor, _ in left}
        for node in program.graph.nodes:
            node.meta["val"] = pytree.tree_map(lambda val: shapes.get(id(val), val), node.meta.get("val"))
        for tensor, node in left:
            torch.utils.swap_tensors(tensor, values[node].clone())


def _kept_by_the_code(program: DirectProgram) -> list[tuple[Tensor, Node]]:
    """Those among what the code was given that something else than the graph refers to."""
    ours = Counter(id(val) for node in program.graph.nodes for val in _listed(node.meta.get("val")))
    found, by_the_loop = [], _by_the_loop()
    for tensor, node in program.given:
        if sys.getrefcount(tensor) > ours[id(tensor)] + held_by_torch(tensor) + by_the_loop:
            found.append((tensor, node))
    return found


def _by_the_loop() -> int:
    """How often a loop over pairs refers to a tensor, which versions of Python count differently: the pair, its name, the question."""
    pairs = [(torch.empty(0), None)]
    for tensor, _ in pairs:
        count = sys.getrefcount(tensor)
    return count


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _values(
    program: DirectProgram, model: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]], wanted: set[Node]
) -> dict[Node, Any]:
    """What the nodes `wanted` give (and others, perhaps), when what they need of the program is run on the example."""
    held = {**program.constants, **dict(model.named_buffers(remove_duplicate=False))}
    held |= dict(model.named_parameters(remove_duplicate=False))
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    given = iter(pytree.tree_map_only(Tensor, Tensor.clone, pytree.tree_leaves(inputs)))
    nodes = list(program.graph.nodes)
    needed = behind(n for n in nodes if n in wanted or writes(n))
    last = {used: node for node in nodes if node in needed for used in node.all_input_nodes}
    env: dict[Node, Any] = {}
    with unwritten(model):
        for node in nodes:
            if node.op == "placeholder":
                target = targets[node.name]
                env[node] = next(given) if target is None else held[target]
            if node not in needed or node.op != "call_function" or wanted <= env.keys():
                continue
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
            for used in {used for used in node.all_input_nodes if last[used] is node} - wanted:
                del env[used]
    return env
