"""What acts on a residual stream: who writes to it, who reads it, and which normalisations lie between.

A stream can be written in another orthonormal basis if all that acts on it commutes with the change: sums, products with numbers
that are the same for all of its channels, whatever moves positions about, and normalisations by its length. What maps into the
stream (its writers) and out of it (its readers) takes the change up. A normalisation's scale acts on every channel by itself, but
can be multiplied into the readers, where only readers see what it made (METHODS.md 2.11).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
from torch.fx import Node

from depgraph import DependencyGraph
from depgraph.consumers import Meeting, meetings
from depgraph.cutting.omitting import has_tensors
from depgraph.errors import RotationError
from depgraph.graph import Value
from depgraph.operators import argument
from depgraph.walks import behind
from importance.commuting import ACTS, LENDING, PASSING, TABLES, ZEROS
from importance.stream_parts import Key, Norm, State, Stream, Use, name_of, where

_LINEAR = PASSING | TABLES | {"add", "sub"}
_ADDENDS = {"addmm": "self", "baddbmm": "self", "addmv": "self"}


def stream_of(graph: DependencyGraph, axis: str) -> Stream:
    """Who writes to a residual stream, an axis of a graph, and who reads it.

    Raises RotationError, which names the place, where something acts on its channels one by one.
    """
    reading = Reading(graph, axis)
    for node in graph.capture.exported.graph.nodes:
        reading.see(node)
    reading.require_all_known()
    stream = reading.stream
    stream.reads = [replace(u, norm=None) if u.norm and u.norm.of in stream.scaled else u for u in stream.reads]
    return stream


class Reading:
    """Follows one stream through the operators of a graph, in their order."""

    def __init__(self, graph: DependencyGraph, axis: str) -> None:
        self.graph = graph
        self.axis = graph[axis]
        self.program = graph.capture.program
        self.stream = Stream(axis, self.axis.size)
        self.states: dict[Node, State] = {}
        self.moving: set[Node] = set()
        self.roots: dict[Node, list[Node] | None] = {}
        nodes = list(graph.capture.exported.graph.nodes)
        self.met: dict[tuple[str, str, int], Meeting] = {
            (m.op, m.operand, m.dim): m for m in meetings(self.program, nodes)
        }
        self.contracted: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for c in self.program.relations.contractions:
            self.contracted[c.op].add((c.operand, c.dim))

    def refuse(self, node: Node, why: str) -> RotationError:
        """The error for a place; `why` follows the operator's name."""
        what = " ".join(filter(None, (name_of(node) or node.name, where(node))))
        return RotationError(
            f"the residual stream {self.stream.axis!r} can't be rotated: {what} {why}; prune it by another score"
        )

    def along(self, node: Node) -> int | None:
        """The dimension of what a node made that is the stream's; None for none. Raises RotationError for half a stream."""
        value = self.program.values.get(node.name)
        if value is None:
            return None
        found = [d for d, dim in enumerate(value.dims) if self._on_stream(dim)]
        if not found:
            return None
        whole = all(self._whole(value.dim(d)) for d in found)
        if not whole or (len(found) > 1 and node.op == "call_function" and node in self.moving):
            raise self.refuse(node, "sees the stream in another order, in part or twice")
        return found[0]

    def _on_stream(self, dim: int) -> bool:
        relations = self.program.relations
        on = self.graph.widths.class_of(dim) in self.axis.labels
        return on and relations.sizes[dim] > 1 and dim not in relations.constant

    def _whole(self, dim: int) -> bool:
        labels = self.axis.labels[self.graph.widths.class_of(dim)]
        return np.array_equal(labels, np.arange(self.axis.size)) and len(self.graph.widths.axes_of(dim)) == 1

    def see(self, node: Node) -> None:
        """Find out what a node's result is to the stream."""
        if node.op == "output":
            self._output(node)
            return
        value = self.program.values.get(node.name)
        if node.op in ("placeholder", "get_attr"):
            if value is None or value.kind == "input":
                self.moving.add(node)
            self.roots[node] = [node]
        elif node.op == "call_function" and (node.users or has_tensors(node)):
            if self.moving.isdisjoint(node.all_input_nodes):
                self._static(node)
            else:
                self.moving.add(node)
                self._moving(node)

    def _output(self, node: Node) -> None:
        free = {value.name for name, value in self.program.outputs.items() if name in self.program.by_products}
        for made in node.all_input_nodes:
            value = self.program.values.get(made.name)
            if value is not None and value.name not in free and made in self.moving and self.along(made) is not None:
                raise self.refuse(made, "is an output of the model")

    def _static(self, node: Node) -> None:
        """Where what is computed without an input comes from, if it is but moved about and added up."""
        name = name_of(node)
        if name in ZEROS:
            self.roots[node] = []
            return
        given = [n for n in node.all_input_nodes if name not in TABLES or n is node.all_input_nodes[0]]
        parts = [self.roots.get(n) for n in given if self.along(n) is not None]
        known = all(part is not None for part in parts) and (name in _LINEAR or self._writes_only(node))
        self.roots[node] = [root for part in parts for root in part or ()] if known else None

    def _writes_only(self, node: Node) -> bool:
        """Is it a product that doesn't sum over the stream?"""
        summed = self.contracted[node.name]
        on = (
            (self.program.values[n.name].name, self.along(n)) for n in node.all_input_nodes if self.along(n) is not None
        )
        return bool(summed) and summed.isdisjoint(on)

    def _moving(self, node: Node) -> None:
        name = name_of(node)
        given = node.all_input_nodes[:1] if name in LENDING else node.all_input_nodes
        on = [n for n in given if self._carries(n)]
        if not on:
            if self.along(node) is not None and name not in ZEROS:
                raise self.refuse(node, "makes the stream from what isn't known to write to it")
            if self.along(node) is not None:
                self.states[node] = State("vector", node)
            return
        state = self._contract(node, on) if self.contracted[node.name] else self._act(node, name, on)
        if state is None:
            return
        if name.endswith("_") and not name.startswith("_") and self.states.get(on[0], state).kind != state.kind:
            raise self.refuse(node, "changes the stream in place")
        if node.name in self.program.values and self.along(node) is None:
            raise self.refuse(node, "folds its channels up")
        self.states[node] = state

    def _carries(self, node: Node) -> bool:
        return node in self.states or (node not in self.moving and self.along(node) is not None)

    def _act(self, node: Node, name: str, on: list[Node]) -> State | None:
        handler = ACTS.get(name)
        if handler is None:
            raise self.refuse(node, "acts on every channel of it by itself")
        return handler(self, node, on)

    def vectors(self, node: Node, on: list[Node]) -> None:
        """All of `on` must be vectors of the stream; those that no input reaches write to it."""
        for given in on:
            if given not in self.moving:
                self.writes(node, given)
            elif self.states[given].kind == "scaled" and self._scales_writer(self.states[given].norm):
                continue
            elif self.states[given].kind != "vector":
                raise self.refuse(node, f"uses {self.told(given)}, which only linear maps may read")

    def _scales_writer(self, norm: Norm | None) -> bool:
        """Is it no norm, but a scale of what is written? It can then be multiplied into the writer, which is noted."""
        if norm is None or norm.of is None or norm.scale is None or norm.shift is not None:
            return False
        self.stream.scaled[norm.of] = norm.scale
        return True

    def written_alone(self, node: Node) -> Node | None:
        """The product that writes what a node passes on, where nothing else sees its result; None where there is none."""
        made, here = self.states[node].made, node
        while here is not made and len(here.users) == 1 and here.all_input_nodes:
            here = here.all_input_nodes[0]
        alone = here is made and len(made.users) == 1
        return made if alone and any(use.op is made for use in self.stream.writes) else None

    def told(self, node: Node) -> str:
        """What isn't a vector of the stream any more, in words."""
        state = self.states[node]
        norm = f" {state.norm.where}" if state.norm is not None and state.norm.where else ""
        return f"what a normalisation{norm} has scaled" if state.kind == "scaled" else "the squares of the stream"

    def writes(self, node: Node, given: Node) -> None:
        """Note the stored tensors that `given` is made of as writers; raises RotationError for what isn't moved about only."""
        roots = self.roots.get(given)
        if roots is None:
            raise self.refuse(node, "adds what is computed from weights in a way that isn't known to be linear")
        for root in roots:
            value = self.program.values[root.name]
            if value.kind not in ("parameter", "buffer") or not value.target:
                raise self.refuse(node, "adds a constant that isn't held by the model")
            self.stream.writes += [Use(target, dim, node) for target, dim in self._own(value, ())]

    def _own(self, value: Value, but: tuple[int, ...]) -> list[Key]:
        """The dims of a stored tensor that are the stream's, without those of `but`."""
        target = self.program.ties.get(value.target, value.target)
        return [(target, d) for d, dim in enumerate(value.dims) if self._on_stream(dim) and d not in but]

    def _contract(self, node: Node, on: list[Node]) -> State | None:
        """A product: it reads what is summed over, and what isn't goes on as a vector."""
        reads, carried = list[Use](), list[Node]()
        if self._in_parts(node):
            raise self.refuse(node, "multiplies parts of its channels by themselves")
        addends = [n for n in on if self._is_addend(node, n)]
        for given in (n for n in on if n not in addends):
            value, dim = self.program.values[given.name], self.along(given)
            assert dim is not None
            if (value.name, dim) not in self.contracted[node.name]:
                carried.append(given)
            elif given in self.moving:
                reads += self._reads(node, given, self.met.get((node.name, value.name, dim)))
            elif self._other_dims(given, dim):
                carried.append(given)
        if len(carried) > 1:
            raise self.refuse(node, "acts on every channel of it by itself")
        self.stream.reads += reads
        summed = {use.key for use in reads}
        for given in carried:
            if given in self.moving:
                self.vectors(node, [given])
            else:
                self._writes_by_product(node, given, summed)
        for given in addends:
            self.vectors(node, [given])
        return State("vector", node) if self.along(node) is not None else None

    def _in_parts(self, node: Node) -> bool:
        """Does a product (a convolution of groups) sum fewer channels than come in?"""
        values, here = self.program.values, (m for (op, _, _), m in self.met.items() if op == node.name)
        return any(values[m.operand].shape[m.dim] != values[m.other].shape[m.other_dim] for m in here)

    def _is_addend(self, node: Node, given: Node) -> bool:
        return argument(node, _ADDENDS.get(name_of(node), "bias")) is given

    def _other_dims(self, given: Node, dim: int) -> bool:
        value = self.program.values[given.name]
        return any(self._on_stream(at) for d, at in enumerate(value.dims) if d != dim)

    def _reads(self, node: Node, given: Node, met: Meeting | None) -> list[Use]:
        state = self.states[given]
        if met is None or (met.stored and not met.weight):
            raise self.refuse(node, "multiplies the stream with what isn't a single weight")
        if not met.stored:
            self.vectors(node, [given])
            return []
        if state.kind == "squares":
            raise self.refuse(node, "reads the squares of the stream")
        self.stream.signals[state.made].append(met.key)
        return [Use(met.weight, met.weight_dim, node, state.norm)]

    def _writes_by_product(self, node: Node, given: Node, summed: set[Key]) -> None:
        roots = self.roots.get(given)
        if roots is None or len(roots) != 1 or self.program.values[roots[0].name].kind != "parameter":
            raise self.refuse(node, "writes to it with what isn't a single weight")
        value = self.program.values[roots[0].name]
        but = tuple(d for target, d in summed if target == self.program.ties.get(value.target, value.target))
        self.stream.writes += [Use(target, dim, node) for target, dim in self._own(value, but)]

    def require_all_known(self) -> None:
        """Raise RotationError when a parameter has a dim on the stream, and is used, but not as reader, writer or norm."""
        known = {use.key for use in (*self.stream.writes, *self.stream.reads)}
        known |= {key for norm in self.stream.norms for node in (norm.scale, norm.shift) for key in self._inside(node)}
        known |= {key for scale in self.stream.scaled.values() for key in self._inside(scale)}
        used = {value.target for value in self.program.values.values() if value.kind == "parameter" and value.used}
        for member in self.axis.members:
            key = self.program.ties.get(member.target, member.target), member.dim
            if member.target in used and key not in known:
                raise RotationError(
                    f"the residual stream {self.stream.axis!r} can't be rotated: it isn't clear what dimension {member.dim} of "
                    f"{member.target!r} does to it; prune it by another score"
                )

    def _inside(self, node: Node | None) -> list[Key]:
        """The dims on the stream of all parameters that a node is computed from."""
        roots = (n for n in behind([node] if node is not None else []) if n.op != "call_function")
        values = (self.program.values[n.name] for n in roots if n.name in self.program.values)
        return [key for value in values for key in self._own(value, ())]


__all__ = ["Key", "Norm", "Reading", "Stream", "Use", "stream_of"]
