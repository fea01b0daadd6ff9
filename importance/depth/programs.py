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
from depgraph.cutting.bypassing import left_of
from depgraph.cutting.draws import may_draw
from depgraph.cutting.mutating import base_of, written_by
from depgraph.errors import DataError
from importance.depth.candidates import ends_of, named_parts

State = dict[Node, Any]
Names = frozenset[str]


@dataclass(frozen=True)
class Cut:
    """A place to begin at: the number of the graph's node there, that of the program's step, and the values needed."""

    place: int
    step: int
    needs: frozenset[Node]


class Way:
    """A model captured on inputs of certain shapes, and where each of the named branches and blocks starts in it.

    Raises DataError when it has no such branch or block on these inputs.
    """

    def __init__(self, graph: DependencyGraph, names: Iterable[str]) -> None:
        self.graph = graph
        self.index = {node.name: k for node, k in graph.residual.flow.index.items()}
        self.tensors = graph.tensors()
        self.devices = sorted({t.device.index or 0 for t in self.tensors.values() if t.device.type == "cuda"})
        parts = named_parts(graph)
        wanted = list(names)
        missing = next((name for name in wanted if name not in parts), None)
        if missing is not None:
            raise DataError(
                f"a batch takes another way through {graph.name}, on which {missing!r} can't be left out: give "
                "batches like the example that it was traced with"
            )
        self.starts = {name: self._start(parts[name].nodes, ends_of(parts[name])[0]) for name in wanted}
        self.places = sorted(set(self.starts.values()))
        exported = graph.capture.exported
        self.inputs = {node: node.all_input_nodes for node in graph.residual.flow.nodes}
        self.targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs}
        self.writers = list(dict.fromkeys(write.writer for write in graph.residual.flow.writes))
        calls = [node for node in graph.residual.flow.nodes if node.op == "call_function"]
        self.drawing = {node for node in calls if may_draw(node)}
        self.flat = {node for node in calls if _is_flat(node)}

    held = 256
    """Programs that are kept to be run on further batches."""

    def part(self, removed: Names) -> Part:
        """The program without some."""
        return Part(self, removed)

    def _start(self, nodes: Iterable[str], source: str) -> int:
        """The first of `nodes` that is computed from the stream: what is dropped before that changes nothing."""
        flow = self.graph.residual.flow
        for name in nodes:
            if any(flow.original(given).name == source for given in flow.nodes[self.index[name]].all_input_nodes):
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
        self.left = left_of(way.graph, removed)
        self.nodes = self.left.nodes
        self.first = next((k for k, node in enumerate(self.nodes) if node.op == "call_function"), len(self.nodes))
        self.last = {given: k for k, node in enumerate(self.nodes) for given in self._read(node)}
        at = {node: k for k, node in enumerate(self.nodes)} if way.writers else {}
        writers = [node for node in way.writers if node in at and node not in self.left.instead]
        writing = [(writer, self._root(target)) for writer in writers for target in written_by(writer)]
        self.written = {root for _, root in writing}
        self.spans = [(at[root] if self._makes(root) else -1, at[writer]) for writer, root in writing]

    @cached_property
    def cuts(self) -> list[Cut]:
        """Where a run may begin, in order: not between the making of memory and a write to it."""
        places = [self.way.index[node.name] for node in self.nodes]
        steps = {max(self.first, bisect_left(places, place)): place for place in self.way.places}
        live, found = set[Node](), []
        for step, node in enumerate(self.nodes):
            if step in steps and not any(root < step <= writer for root, writer in self.spans):
                live = {n for n in live if self.last.get(n, -1) >= step}
                found.append(Cut(steps[step], step, frozenset(live)))
            if self._makes(node) or node in self.written:
                live.add(node)
        return found

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
        first = begin[0].step if begin is not None else self.first
        env = self._given(iter(inputs), begin[1] if begin is not None else None, state or {})
        cuts = {cut.step: cut for cut in self.cuts if cut.step > first} if keep is not None else {}
        shown = seen or {}
        for node in env if shown else ():
            if node.name in shown:
                shown[node.name](env[node])
        with torch.no_grad(), torch.random.fork_rng(devices=self.way.devices):
            for step in range(first, len(self.nodes)):
                node = self.nodes[step]
                if step in cuts and keep is not None:
                    keep(cuts[step], {n: env[n] for n in cuts[step].needs})
                if not self._makes(node):
                    continue
                env[node] = self._made(node, env)
                if node.name in shown:
                    shown[node.name](env[node])
                for given in [read for read in self._read(node) if self.last[read] == step]:
                    del env[given]
        return self._output(env)

    def _read(self, node: Node) -> list[Node]:
        """What a node is computed from here."""
        return [self.left.instead[node]] if node in self.left.instead else self.way.inputs[node]

    def _makes(self, node: Node) -> bool:
        """Is a node computed, rather than given?"""
        return node.op == "call_function"

    def _root(self, node: Node) -> Node:
        """The node that made the memory of what stands for a node here."""
        while True:
            if node in self.left.copied:
                return node
            above = self.left.instead.get(node) or base_of(node)
            if above is None:
                return node
            node = above

    def _given(self, inputs: Iterator[Any], begun: State | None, state: Mapping[str, Tensor]) -> dict[Node, Any]:
        """What is there from the start, or where a run begins."""
        env: dict[Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                target = self.way.targets[node.name]
                env[node] = next(inputs) if target is None else self._held(str(target), state)
            elif node.op == "get_attr":
                env[node] = getattr(self.exported.graph_module, str(node.target))
            if node in env and node in self.written and begun is None:
                env[node] = env[node].clone()
        if begun is not None:
            env.update((node, value) for node, value in begun.items() if self.last.get(node, -1) >= 0)
        return env

    def _held(self, name: str, state: Mapping[str, Tensor]) -> Any:
        return state[name] if name in state else self.way.fetch(name)

    def _made(self, node: Node, env: Mapping[Node, Any]) -> Any:
        if node in self.left.instead:
            passed = env[self.left.instead[node]]
            return passed.clone() if node in self.left.copied else passed
        if node in self.way.drawing:
            torch.manual_seed(zlib.crc32(node.name.encode()))
        if node in self.way.flat:
            args = tuple([env[a] if isinstance(a, Node) else a for a in node.args])
            return node.target(*args, **node.kwargs)  # type: ignore[operator]
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _output(self, env: Mapping[Node, Any]) -> Any:
        """The outputs in the form in which the model returns them."""
        leaves: list[Any] = list(self.nodes[-1].args[0])  # type: ignore[arg-type]
        kinds = [spec.kind for spec in self.exported.graph_signature.output_specs]
        spec = getattr(self.exported, "output_spec", None) or self.exported.call_spec.out_spec  # type: ignore[attr-defined]
        if len(kinds) == len(leaves):
            leaves = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
        leaves = leaves[: spec.num_leaves]
        return pytree.tree_unflatten([env[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves], spec)


def _is_flat(node: Node) -> bool:
    """Is a node given other nodes as arguments by position only, and not in lists?"""
    return all(isinstance(arg, Node) or _is_plain(arg) for arg in node.args) and _is_plain(node.kwargs)


def _is_plain(value: Any) -> bool:
    """Are there no nodes in an argument?"""
    found: list[Node] = []
    map_arg(value, found.append)
    return not found
