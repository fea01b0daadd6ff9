"""A captured program without some of its branches and blocks, which can be run from the middle.

A run may begin at a *cut*, in front of the first operator of a candidate, from the values that are read after it. Which
values these have depends only on what is left out before the cut, so runs without different sets share them.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph import DependencyGraph
from depgraph.cutting.bypassing import INSTEAD, bypassed
from depgraph.cutting.draws import may_draw
from depgraph.cutting.mutating import writes
from depgraph.errors import DataError

State = dict[str, Any]
Names = frozenset[str]


@dataclass(frozen=True)
class Cut:
    """A place to begin at: the number of the graph's node there, that of the program's step, and the values needed."""

    place: int
    step: int
    needs: frozenset[str]


class Way:
    """A model captured on inputs of certain shapes, and where each of the named branches and blocks starts in it.

    Raises DataError when it has no such branch or block on these inputs.
    """

    def __init__(self, graph: DependencyGraph, names: Iterable[str]) -> None:
        self.graph = graph
        self.index = {node.name: k for node, k in graph.residual.flow.index.items()}
        self.tensors = graph.tensors()
        parts = {part.name: part for part in (*graph.blocks, *graph.branches)}
        wanted = list(names)
        missing = next((name for name in wanted if name not in parts), None)
        if missing is not None:
            raise DataError(
                f"a batch takes another way through {type(graph.model).__name__}, on which {missing!r} can't be left out: give "
                "batches like the example that it was traced with"
            )
        self.starts = {
            name: self._start(part.nodes, getattr(part, "source", "") or part.input)  # type: ignore[union-attr]
            for name, part in parts.items()
            if name in set(wanted)
        }
        self.places = sorted(set(self.starts.values()))

    def _start(self, nodes: Iterable[str], source: str) -> int:
        """The first of `nodes` that is computed from the stream: what is dropped before that changes nothing."""
        named = self.graph.residual.flow
        by_name = {node.name: node for node in named.nodes}
        for name in nodes:
            if any(named.original(given).name == source for given in by_name[name].all_input_nodes):
                return self.index[name]
        return min(self.index[name] for name in nodes)

    def before(self, place: int, removed: Iterable[str]) -> Names:
        """Which of `removed` start before a place."""
        return frozenset(name for name in removed if self.starts[name] < place)

    def fetch(self, name: str) -> Any:
        """A tensor of the model, or a constant of its capture."""
        return self.tensors[name] if name in self.tensors else self.graph.capture.exported.constants[name]


class Part:
    """The program of a way without the branches and blocks of `removed`."""

    def __init__(self, way: Way, removed: Names) -> None:
        self.way, self.removed = way, removed
        self.exported = way.graph.capture.exported
        self.nodes: list[Node] = list(bypassed(way.graph, removed).graph.nodes)
        self.names = {node: str(node.meta.get(INSTEAD, node.name)) for node in self.nodes}
        self.targets = {spec.arg.name: spec.target for spec in self.exported.graph_signature.input_specs}
        written = writes(self.nodes)
        self.written = {write.root for write in written}
        at = {node: k for k, node in enumerate(self.nodes)}
        self.spans = [(at[w.root] if w.root.op == "call_function" else -1, at[w.writer]) for w in written]
        self.last = {given: k for k, node in enumerate(self.nodes) for given in node.all_input_nodes}

    @cached_property
    def cuts(self) -> list[Cut]:
        """Where a run may begin, in order: not between the making of memory and a write to it."""
        places = [self.way.index[self.names[node]] for node in self.nodes]
        first = next((k for k, node in enumerate(self.nodes) if node.op == "call_function"), len(self.nodes))
        steps = ((place, max(first, bisect_left(places, place))) for place in self.way.places)
        return [
            Cut(place, step, self._live(step))
            for place, step in steps
            if not any(root < step <= writer for root, writer in self.spans)
        ]

    def _live(self, step: int) -> frozenset[str]:
        """The values made before a step and read in it or later."""
        before = (node for node in self.nodes[:step] if self.last.get(node, -1) >= step)
        return frozenset(self.names[n] for n in before if n.op == "call_function" or n in self.written)

    def run(
        self,
        inputs: Iterable[Any],
        begin: tuple[Cut, State] | None = None,
        keep: Callable[[Cut, State], None] | None = None,
        seen: Mapping[str, Callable[[Tensor], None]] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """What the model returns without the removed parts, in its own form.

        `inputs` are the leaves of the batch, `begin` where to begin and the values there; `keep` is given those of each later
        cut, `seen` has what is called with what the nodes of these names make, `state` tensors in place of the model's.
        """
        first = begin[0].step if begin is not None else 0
        env = self._given(iter(inputs), begin[1] if begin is not None else None, state or {})
        cuts = {cut.step: cut for cut in self.cuts if cut.step > first} if keep is not None else {}
        for node in env if seen is not None else ():
            if self.names[node] in seen:
                seen[self.names[node]](env[node])
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for step, node in enumerate(self.nodes):
                if step < first or node.op != "call_function":
                    continue
                if step in cuts and keep is not None:
                    keep(cuts[step], self._state(env, cuts[step]))
                env[node] = self._made(node, env)
                if seen is not None and self.names[node] in seen:
                    seen[self.names[node]](env[node])
                for given in node.all_input_nodes:
                    if self.last[given] == step:
                        del env[given]
        return self._output(env)

    def _given(self, inputs: Iterator[Any], begun: State | None, state: Mapping[str, Tensor]) -> dict[Node, Any]:
        """What is there from the start, or where a run begins."""
        env: dict[Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                target = self.targets[node.name]
                env[node] = next(inputs) if target is None else self._held(str(target), state)
            elif node.op == "get_attr":
                env[node] = getattr(self.exported.graph_module, str(node.target))
            if node in env and node in self.written and begun is None:
                env[node] = env[node].clone()
            elif begun is not None and self.names[node] in begun:
                env[node] = begun[self.names[node]]
        return env

    def _held(self, name: str, state: Mapping[str, Tensor]) -> Any:
        return state[name] if name in state else self.way.fetch(name)

    def _state(self, env: Mapping[Node, Any], cut: Cut) -> State:
        return {self.names[node]: value for node, value in env.items() if self.names[node] in cut.needs}

    def _made(self, node: Node, env: Mapping[Node, Any]) -> Any:
        if may_draw(node):
            torch.manual_seed(zlib.crc32(self.names[node].encode()))
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _output(self, env: Mapping[Node, Any]) -> Any:
        """The outputs in the form in which the model returns them."""
        leaves = self.nodes[-1].args[0]
        specs = self.exported.graph_signature.output_specs
        kinds = [spec.kind for spec in specs]
        spec = getattr(self.exported, "output_spec", None) or self.exported.call_spec.out_spec  # type: ignore[attr-defined]
        if len(kinds) == len(leaves):  # type: ignore[arg-type]
            leaves = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]  # type: ignore[arg-type]
        leaves = list(leaves)[: spec.num_leaves]  # type: ignore[arg-type]
        return pytree.tree_unflatten([env[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves], spec)
