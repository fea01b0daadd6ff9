"""The captured program run on the original weights, as if a plan were applied: the other side of the check.

Axes in `sliced` are cut, axes in `zeroed` stay and are filled with zeros where an operator contracts over them, which is
where removed groups would feed the rest. With nothing sliced, this is the original with the consumers' columns zeroed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph.capture.exported import CapturedProgram
from depgraph.cutting.rewriting import call_arguments, rewrite
from depgraph.cutting.slicing import sliced_tensor, widened
from depgraph.graph import Program, Value
from depgraph.widths import Kept

Fetch = Callable[[str], torch.Tensor]
Outputs = list[tuple[Value, torch.Tensor]]
_PRODUCTS = frozenset(["linear", "addmm", "mm", "matmul", "conv1d", "conv2d", "conv3d", "embedding"])
_HEAVIER = 8  # from this ratio on it costs less to fit what a weight is multiplied with to the weight than to slice it


class _Stored(NamedTuple):
    """A tensor of the original, by name: it is fetched, and sliced, where it is used."""

    target: str


class Reference:
    """A captured program that can be run with some axes sliced and others zeroed."""

    def __init__(self, exported: CapturedProgram, program: Program, sliced: Kept, zeroed: Kept) -> None:
        self.exported = exported
        self.program = program
        self.sliced = sliced
        self.masks = self._masks(zeroed)
        self.last_use = _last_uses(exported)
        self.random_state: torch.Tensor | None = None

    def _masks(self, zeroed: Kept) -> dict[str, dict[str, list[tuple[int, np.ndarray]]]]:
        """For each operator and operand, the positions to fill with zeros, after slicing.

        One operand of a product is enough, the smallest one: what zeros are multiplied with doesn't matter.
        """
        found: dict[str, list[tuple[int, Value, int, frozenset[str]]]] = {}
        for c in self.program.relations.contractions:
            value = self.program.values[c.operand]
            axes = frozenset(zeroed.widths.axes_of(value.dim(c.dim))) & zeroed.masks.keys()
            if axes:
                size = math.prod(value.shape)
                found.setdefault(c.op, []).append((size, value, c.dim, axes))
        masks: dict[str, dict[str, list[tuple[int, np.ndarray]]]] = {}
        for op, operands in found.items():
            covered: frozenset[str] = frozenset()
            for _, value, dim, axes in sorted(operands, key=lambda entry: entry[0]):
                gone = self._gone(zeroed, value, dim)
                if len(gone) and not axes <= covered:
                    masks.setdefault(op, {}).setdefault(value.name, []).append((dim, gone))
                    covered |= axes
        return masks

    def _gone(self, zeroed: Kept, value: Value, dim: int) -> np.ndarray:
        """Where in the sliced dim the indices stand that are zeroed."""
        stays, here = zeroed.of(value, dim), self.sliced.of(value, dim)
        here = np.arange(value.shape[dim]) if here is None else here
        return np.flatnonzero(~np.isin(here, here if stays is None else stays))

    def run(self, fetch: Fetch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outputs:
        """The program's tensor outputs with their values; `fetch` gives a tensor of the original by name."""
        (found,) = run_together([self], fetch, args, kwargs)
        return found

    def _steps(self, fetch: Fetch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generator[None, None, Outputs]:
        """Run the program, a node a step."""
        given = iter(pytree.tree_leaves((args, dict(kwargs))))
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        env: dict[Node, Any] = {}
        outputs: list[tuple[Node, Any]] = []
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                target = specs[node.name].target
                env[node] = next(given) if target is None else _Stored(target)
            elif node.op == "get_attr":
                env[node] = getattr(self.exported.graph_module, str(node.target))
            elif node.op == "call_function":
                env[node] = self._drawn(node, env, fetch) if _draws(node) else self._call(node, env, fetch)
            else:
                found = [n for n in pytree.tree_leaves(node.args) if isinstance(n, Node)]
                outputs = [(n, self._cut(n, env, fetch)) for n in found]
            for dead in self.last_use.get(node, ()):
                env.pop(dead, None)
            yield
        return [(self.program.values[n.name], o) for n, o in outputs if isinstance(o, torch.Tensor)]

    def _drawn(self, node: Node, env: Mapping[Node, Any], fetch: Fetch) -> Any:
        """A node that draws random numbers: from a state of this run's own."""
        outside = torch.get_rng_state()
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
        made = self._call(node, env, fetch)
        self.random_state = torch.get_rng_state()
        torch.set_rng_state(outside)
        return made

    def _cut(self, node: Node, env: Mapping[Node, Any], fetch: Fetch) -> Any:
        """What a node made; a tensor of the original narrowed as the plan says."""
        made = env[node]
        if not isinstance(made, _Stored):
            return made
        return sliced_tensor(fetch(made.target), self.sliced, self.program.values[node.name])

    def _whole(self, node: Node, env: Mapping[Node, Any], fetch: Fetch) -> Any:
        """What a node made, at its full size."""
        made = env[node]
        if isinstance(made, _Stored):
            return fetch(made.target)
        return widened(made, self.sliced, self.program.values[node.name]) if isinstance(made, torch.Tensor) else made

    def _call(self, node: Node, env: Mapping[Node, Any], fetch: Fetch) -> Any:
        target, args, kwargs = node.target, node.args, node.kwargs
        whole = self._is_heavy(node, env)
        if self.sliced.masks and not whole and target is not operator.getitem:
            changed = rewrite(node, self.program.values, self.sliced)
            if changed is not None:
                target = changed.target or target
                args, kwargs = call_arguments(changed)
        masks = self.masks.get(node.name)

        def load(item: Node) -> Any:
            made = self._whole(item, env, fetch) if whole else self._cut(item, env, fetch)
            if masks is not None:
                value = self.program.values.get(item.name)
                for dim, gone in masks.get(value.name, ()) if value is not None else ():
                    at = gone if not whole else self._unsliced(value, dim, gone)  # type: ignore[arg-type]
                    made = made.index_fill(dim, torch.from_numpy(at).to(made.device), 0)
            return made

        made = target(*map_arg(args, load), **map_arg(kwargs, load))  # type: ignore[operator]
        return sliced_tensor(made, self.sliced, self.program.values[node.name]) if whole else made

    def _is_heavy(self, node: Node, env: Mapping[Node, Any]) -> bool:
        """Is a weight that would be sliced far larger than what it is multiplied with and what comes out?

        Then the product is taken with the whole weight: zeros where indices had gone add nothing, and what comes out for
        such is dropped.
        """
        if not self.sliced.masks or _name(node) not in _PRODUCTS:
            return False
        values = [self.program.values[n.name] for n in node.all_input_nodes]
        stored = [v for n, v in zip(node.all_input_nodes, values, strict=True) if isinstance(env[n], _Stored)]
        moving = [*(v for v in values if v not in stored), self.program.values[node.name]]
        large = max(stored, key=lambda v: math.prod(v.shape), default=None)
        if large is None or self.sliced.shape(large) == large.shape:
            return False
        return math.prod(large.shape) > _HEAVIER * sum(math.prod(v.shape) for v in moving)

    def _unsliced(self, value: Value, dim: int, at: np.ndarray) -> np.ndarray:
        here = self.sliced.of(value, dim)
        return at if here is None else here[at]


def run_together(
    references: list[Reference], fetch: Fetch, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Outputs]:
    """Run several side by side, node by node, so that a weight is read from memory once; the outputs of each."""
    runs = [reference._steps(fetch, args, kwargs) for reference in references]
    results: dict[int, Outputs] = {}
    while len(results) < len(runs):
        for number, steps in enumerate(runs):
            try:
                next(steps)
            except StopIteration as end:
                results[number] = end.value
    return [results[number] for number in range(len(runs))]


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _name(node: Node) -> str:
    return str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""


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
