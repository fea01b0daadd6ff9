"""The captured program run on the original weights, as if a plan were applied: the other side of the check.

Axes in `sliced` are cut (weights are narrowed one at a time, as they are needed), axes in `zeroed` stay and are filled
with zeros where an operator contracts over them, which is where removed groups would feed the rest. With nothing sliced,
this is the original with the consumers' columns zeroed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.capture.exported import CapturedProgram
from depgraph.cutting.rewriting import call_arguments, rewrite
from depgraph.graph import Program, Value
from depgraph.widths import Kept

Fetch = Callable[[str], torch.Tensor]


class Reference:
    """A captured program that can be run with some axes sliced and others zeroed."""

    def __init__(self, exported: CapturedProgram, program: Program, sliced: Kept, zeroed: Kept) -> None:
        self.exported = exported
        self.program = program
        self.sliced = sliced
        self.masks = self._masks(zeroed)
        self.last_use = _last_uses(exported)

    def _masks(self, zeroed: Kept) -> dict[str, dict[str, list[tuple[int, np.ndarray]]]]:
        """For each operator and operand, the positions to fill with zeros, after slicing."""
        masks: dict[str, dict[str, list[tuple[int, np.ndarray]]]] = {}
        for c in self.program.relations.contractions:
            value = self.program.values[c.operand]
            stays = zeroed.of(value, c.dim)
            if stays is None:
                continue
            here = self.sliced.of(value, c.dim)
            here = np.arange(value.shape[c.dim]) if here is None else here
            gone = np.flatnonzero(~np.isin(here, stays))
            if len(gone):
                masks.setdefault(c.op, {}).setdefault(c.operand, []).append((c.dim, gone))
        return masks

    def run(self, fetch: Fetch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Value, torch.Tensor]]:
        """The program's tensor outputs with their values; `fetch` gives a tensor of the original by name."""
        given = iter(pytree.tree_leaves((args, dict(kwargs))))
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        env: dict[Node, Any] = {}
        outputs: list[tuple[Node, Any]] = []
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                env[node] = next(given) if spec.target is None else (fetch, spec.target)
            elif node.op == "get_attr":
                env[node] = getattr(self.exported.graph_module, str(node.target))
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            else:
                outputs = [(n, self._stored(n, env)) for n in pytree.tree_leaves(node.args) if isinstance(n, Node)]
            for dead in self.last_use.get(node, ()):
                env.pop(dead, None)
        return [(self.program.values[n.name], o) for n, o in outputs if isinstance(o, torch.Tensor)]

    def _stored(self, node: Node, env: Mapping[Node, Any]) -> Any:
        found = env[node]
        if not (isinstance(found, tuple) and len(found) == 2 and callable(found[0])):
            return found
        fetch, target = found
        return sliced_tensor(fetch(target), self.sliced, self.program.values[node.name])

    def _call(self, node: Node, env: Mapping[Node, Any]) -> Any:
        target, args, kwargs = node.target, node.args, node.kwargs
        changed = None if target is operator.getitem else rewrite(node, self.program.values, self.sliced)
        if changed is not None:
            target = changed.target or target
            args, kwargs = call_arguments(changed)
        masks = self.masks.get(node.name, {})

        def load(item: Any) -> Any:
            if not isinstance(item, Node):
                return item
            value = self._stored(item, env)
            for dim, gone in masks.get(self.program.values[item.name].name, ()) if masks else ():
                value = value.index_fill(dim, torch.from_numpy(gone).to(value.device), 0)
            return value

        args, kwargs = pytree.tree_map(load, (args, kwargs), is_leaf=lambda x: isinstance(x, Node))
        return target(*args, **kwargs)  # type: ignore[operator]


def sliced_tensor(tensor: torch.Tensor, kept: Kept, value: Value) -> torch.Tensor:
    """`tensor` with each dim narrowed to its kept indices; the tensor itself when all stay."""
    for d in range(tensor.ndim):
        indices = kept.of(value, d)
        if indices is not None:
            tensor = tensor.index_select(d, torch.from_numpy(indices).to(tensor.device))
    return tensor


def _last_uses(exported: CapturedProgram) -> dict[Node, list[Node]]:
    """After which node each value can be let go."""
    last: dict[Node, Node] = {}
    for node in exported.graph.nodes:
        for parent in node.all_input_nodes:
            last[parent] = node
    dead: dict[Node, list[Node]] = {}
    for node, user in last.items():
        dead.setdefault(user, []).append(node)
    return dead
