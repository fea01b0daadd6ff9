"""What acts on a residual stream: who writes to it, who reads it, and which normalisations lie between.

A stream can be written in another orthonormal basis if all that acts on it commutes with the change: sums, products with numbers
that are the same for all of its channels, whatever moves positions about, and normalisations by its length. What maps into the
stream (its writers) and out of it (its readers) takes the change up. A normalisation's scale acts on every channel by itself, but
can be multiplied into the readers, where only readers see what it made (METHODS.md 2.11).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.fx import Node

from depgraph import DependencyGraph
from depgraph.consumers import Meeting, meetings
from depgraph.cutting.sides import operator_name
from depgraph.errors import RotationError
from depgraph.graph import Value
from depgraph.rules.domains import MOVES

Key = tuple[str, int]

_JOINS = frozenset(["cat", "concat", "concatenate", "stack", "hstack", "vstack"])
_PASS = (frozenset(name.removeprefix("aten.") for name in MOVES) - {"sort"}) | _JOINS | {"dropout", "getitem"}
_SUMS = frozenset(["sum", "mean"])
_PLACES = frozenset(["index_add", "index_add_", "index_put", "index_put_", "index_copy", "index_copy_", "scatter_add"])
_TABLES = frozenset(["embedding", "embedding_bag"])
_LENDS = frozenset(["type_as", "expand_as", "view_as", "reshape_as"])  # what they are given second lends its dtype or shape
_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])
_ADDENDS = {"addmm": "self", "baddbmm": "self", "addmv": "self"}


@dataclass(frozen=True)
class Norm:
    """A normalisation that multiplies with `scale` and adds `shift` (nodes that no input reaches; None: it doesn't)."""

    where: str
    scale: Node | None = None
    shift: Node | None = None


@dataclass(frozen=True)
class Use:
    """Dim `dim` of tensor `target` meets the stream in operator `op`; `norm` made what a reader reads, None for none."""

    target: str
    dim: int
    op: Node
    norm: Norm | None = None

    @property
    def key(self) -> Key:
        return self.target, self.dim


@dataclass
class Stream:
    """One residual stream: an axis of a graph, and the dims of tensors that write to it and read it.

    `signals` has for everything that is read the consumers that read it. `centred`: something subtracts the mean of the
    channels, so that only bases in which all of them weigh the same will do.
    """

    axis: str
    width: int
    writes: list[Use] = field(default_factory=list)
    reads: list[Use] = field(default_factory=list)
    signals: dict[Node, list[Key]] = field(default_factory=lambda: defaultdict(list))
    centred: bool = False

    @property
    def norms(self) -> list[Norm]:
        """The normalisations whose results are read, each once."""
        return list(dict.fromkeys(use.norm for use in self.reads if use.norm is not None))


@dataclass(frozen=True)
class _State:
    """What a value is to the stream: "vector", "squares" of one, or a vector that a norm "scaled"; `made` is where from."""

    kind: str
    made: Node
    norm: Norm | None = None


def stream_of(graph: DependencyGraph, axis: str) -> Stream:
    """Who writes to a residual stream, an axis of a graph, and who reads it.

    Raises RotationError, which names the place, where something acts on its channels one by one.
    """
    reading = _Reading(graph, axis)
    for node in graph.capture.exported.graph.nodes:
        reading.see(node)
    reading.require_all_known()
    return reading.stream


class _Reading:
    """Follows one stream through the operators of a graph, in their order."""

    def __init__(self, graph: DependencyGraph, axis: str) -> None:
        self.graph = graph
        self.axis = graph[axis]
        self.program = graph.capture.program
        self.stream = Stream(axis, self.axis.size)
        self.states: dict[Node, _State] = {}
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
        value = self.program.values.get(node.name)
        module = value.module if value is not None else ""
        places = [f"in {module!r}" if module else "", f"at {value.where}" if value is not None and value.where else ""]
        place = " ".join(p for p in places if p)
        return RotationError(
            f"the residual stream {self.stream.axis!r} can't be rotated: {_name(node)}{' ' if place else ''}{place} {why}; prune "
            "it by another score"
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
        elif node.op == "call_function":
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
        name = operator_name(node.target) or _name(node)
        if name in _ZEROS:
            self.roots[node] = []
            return
        given = [n for n in node.all_input_nodes if name not in _TABLES or n is node.all_input_nodes[0]]
        parts = [self.roots.get(n) for n in given if self.along(n) is not None]
        known = all(part is not None for part in parts) and name in _PASS | _TABLES | {"add", "sub"}
        self.roots[node] = [root for part in parts for root in part or ()] if known else None

    def _moving(self, node: Node) -> None:
        name = operator_name(node.target) or _name(node)
        given = node.all_input_nodes[:1] if name in _LENDS else node.all_input_nodes
        on = [n for n in given if self._carries(n)]
        if not on:
            if self.along(node) is not None and name not in _ZEROS:
                raise self.refuse(node, "makes the stream from what isn't known to write to it")
            if self.along(node) is not None:
                self.states[node] = _State("vector", node)
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

    def _act(self, node: Node, name: str, on: list[Node]) -> _State | None:
        handler = _ACTS.get(name)
        if handler is None:
            raise self.refuse(node, "acts on every channel of it by itself")
        return handler(self, node, on)

    def _vectors(self, node: Node, on: list[Node]) -> None:
        """All of `on` must be vectors of the stream; those that no input reaches write to it."""
        for given in on:
            if given not in self.moving:
                self._writes(node, given)
            elif self.states[given].kind != "vector":
                raise self.refuse(node, f"uses {self._told(given)}, which only linear maps may read")

    def _told(self, node: Node) -> str:
        state = self.states[node]
        norm = f" at {state.norm.where}" if state.norm is not None and state.norm.where else ""
        return f"what a normalisation{norm} has scaled" if state.kind == "scaled" else "the squares of the stream"

    def _writes(self, node: Node, given: Node) -> None:
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

    def _contract(self, node: Node, on: list[Node]) -> _State | None:
        """A product: it reads what is summed over, and what isn't goes on as a vector."""
        reads, carried = list[Use](), list[Node]()
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
                self._vectors(node, [given])
            else:
                self._writes_by_product(node, given, summed)
        for given in addends:
            self._vectors(node, [given])
        return _State("vector", node) if self.along(node) is not None else None

    def _is_addend(self, node: Node, given: Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        wanted = _ADDENDS.get(operator_name(node.target), "bias")
        at = names.index(wanted) if wanted in names else len(node.args)
        return (node.args[at] if at < len(node.args) else node.kwargs.get(wanted)) is given

    def _other_dims(self, given: Node, dim: int) -> bool:
        value = self.program.values[given.name]
        return any(self._on_stream(at) for d, at in enumerate(value.dims) if d != dim)

    def _reads(self, node: Node, given: Node, met: Meeting | None) -> list[Use]:
        state = self.states[given]
        if met is None or (met.stored and not met.weight):
            raise self.refuse(node, "multiplies the stream with what isn't a single weight")
        if not met.stored:
            self._vectors(node, [given])
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
        for member in self.axis.members:
            value = next(v for v in self.program.values.values() if v.target == member.target)
            key = self.program.ties.get(member.target, member.target), member.dim
            if key not in known and value.used and member.kind == "parameter":
                raise RotationError(
                    f"the residual stream {self.stream.axis!r} can't be rotated: it isn't clear what {member.target!r} does to it "
                    "along its dimension "
                    f"{member.dim}; prune it by another score"
                )

    def _inside(self, node: Node | None) -> list[Key]:
        """The dims on the stream of all parameters that a node is computed from."""
        queue, found = [node] if node is not None else [], list[Key]()
        while queue:
            here = queue.pop()
            queue += here.all_input_nodes
            value = self.program.values.get(here.name)
            if here.op != "call_function" and value is not None:
                found += self._own(value, ())
        return found

    def where(self, node: Node) -> str:
        """The place of a node in words."""
        value = self.program.values.get(node.name)
        return "" if value is None else value.module or value.where


def _pass(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    """Positions are moved about, chosen or joined; the stream stays what it is."""
    states = [reading.states.get(n) for n in on]
    first = states[0]
    if len(on) == 1 and first is not None:
        return replace(first)
    reading._vectors(node, on)
    return _State("vector", node)


def _add(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    moving = [n for n in on if n in reading.moving]
    state = reading.states[moving[0]] if moving else None
    if len(node.all_input_nodes) > len(on) or len(node.args) < 2 or not all(isinstance(n, Node) for n in node.args[:2]):
        return _offset(reading, node, on)
    if len(moving) == 1 and len(on) == 2 and state is not None and state.kind == "scaled":
        static = next(n for n in on if n not in reading.moving)
        if state.norm is None or state.norm.shift is not None or _name(node) != "add":
            raise reading.refuse(node, f"adds to {reading._told(moving[0])}")
        return _State("scaled", node, replace(state.norm, shift=static))
    reading._vectors(node, on)
    return _State("vector", node)


def _offset(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    """The same number is added to all channels: a mean that is subtracted. Bases in which they weigh the same keep it."""
    other = [n for n in node.args[:2] if n not in on]
    if other == [0] or other == [0.0]:
        return _pass(reading, node, on)
    if not isinstance(other[0], Node) or other[0] not in reading.moving:
        raise reading.refuse(node, "adds a number to every channel of it")
    reading._vectors(node, on)
    reading.stream.centred = True
    return _State("vector", node)


def _multiply(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    if len(on) == 1 and len(node.all_input_nodes) == 1 and list(node.args[:2]).count(on[0]) == 2:
        reading._vectors(node, on)
        return _State("squares", node)
    if len(on) == 1:
        if on[0] not in reading.moving:
            raise reading.refuse(node, "multiplies a weight on its channels with data")
        if _name(node).startswith("div") and node.args[0] is not on[0]:
            raise reading.refuse(node, "divides by every channel of it")
        state = reading.states[on[0]]
        if state.norm is not None and state.norm.shift is not None:
            raise reading.refuse(node, f"multiplies {reading._told(on[0])}")
        return _State(state.kind, node, state.norm)
    static = [n for n in on if n not in reading.moving]
    if len(static) != 1 or not _name(node).startswith("mul"):
        raise reading.refuse(node, "acts on every channel of it by itself")
    moving = next(n for n in on if n in reading.moving)
    reading._vectors(node, [moving])
    return _State("scaled", node, Norm(reading.where(node), scale=static[0]))


def _together(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    """Vectors of the stream make another."""
    reading._vectors(node, on)
    return _State("vector", node)


def _power(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    if _name(node) != "square" and node.args[1] != 2:
        raise reading.refuse(node, "takes a power of every channel of it")
    reading._vectors(node, on)
    return _State("squares", node)


def _reduce(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    """Over positions the stream goes on; over its own channels only the mean, or the sum of squares, stays what it is."""
    state = reading.states[on[0]]
    if reading.along(node) is not None:
        reading._vectors(node, on)
        return _State("vector", node)
    if state.kind == "scaled":
        raise reading.refuse(node, f"sums up {reading._told(on[0])}")
    if not _over_last_only(reading, node, on[0]):
        raise reading.refuse(node, "sums over it and something else at once")
    reading.stream.centred = reading.stream.centred or state.kind == "vector"
    return None


def _over_last_only(reading: _Reading, node: Node, given: Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    rank = len(reading.program.values[given.name].shape)
    listed = list(dims) if isinstance(dims, (list, tuple)) else [dims] if isinstance(dims, int) else range(rank)
    return [d % rank for d in listed] == [reading.along(given)]


def _spread(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    reading._vectors(node, on)
    if reading.along(node) is not None or not _over_last_only(reading, node, on[0]):
        raise reading.refuse(node, "takes the variance of every channel of it")
    reading.stream.centred = True
    return None


def _length(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    reading._vectors(node, on)
    order = node.args[1] if len(node.args) > 1 else 2
    over = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    rank = len(reading.program.values[on[0].name].shape)
    listed = list(over) if isinstance(over, (list, tuple)) else [over] if isinstance(over, int) else range(rank)
    if order != 2 or [d % rank for d in listed] != [reading.along(on[0])]:
        raise reading.refuse(node, "takes another length than the Euclidean one of all its channels")
    return None


def _normalise(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    """A layer or RMS norm in one operator."""
    given: Any = node.args[0]
    reading._vectors(node, [given])
    own = {
        argument.name: node.args[k] if len(node.args) > k else node.kwargs.get(argument.name)
        for k, argument in enumerate(node.target._schema.arguments)  # type: ignore[union-attr]
    }
    if list(own["normalized_shape"] or ()) != [reading.axis.size]:
        raise reading.refuse(node, "normalises it together with something else")
    reading.stream.centred = reading.stream.centred or "rms" not in _name(node)
    scale, shift = (n if isinstance(n := own.get(name), Node) else None for name in ("weight", "bias"))
    if any(n in reading.moving for n in (scale, shift) if n is not None):
        raise reading.refuse(node, "scales it by what is computed from data")
    if scale is None and shift is None:
        return _State("vector", node)
    return _State("scaled", node, Norm(reading.where(node), scale, shift))


def _table(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    if on != [node.args[0]] or on[0] in reading.moving:
        raise reading.refuse(node, "looks something up by the channels of it")
    reading._writes(node, on[0])
    return _State("vector", node)


def _choose(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    """Between vectors of the stream, or one and zeros, by a mask that has no channels."""
    numbers = [n for n in node.args[1:] if isinstance(n, (int, float))]
    mask = node.args[1] if _name(node) == "masked_fill" else node.args[0]
    others = [n for n in node.args if isinstance(n, Node) and n not in on and n is not mask]
    if mask in on or any(numbers) or others:
        raise reading.refuse(node, "masks its channels, or puts other numbers in")
    reading._vectors(node, on)
    return _State("vector", node)


def _nothing(reading: _Reading, node: Node, on: list[Node]) -> _State | None:
    """Only the shape of the stream is looked at."""
    return _State("vector", node) if reading.along(node) is not None else None


_Act = Callable[[_Reading, Node, list[Node]], "_State | None"]
_ACTS: dict[str, _Act] = {
    **dict.fromkeys(_PASS, _pass),
    **dict.fromkeys((*_PLACES, "neg"), _together),
    **dict.fromkeys(_SUMS, _reduce),
    **dict.fromkeys(_TABLES, _table),
    **dict.fromkeys(_ZEROS, _nothing),
    **dict.fromkeys(("add", "add_", "sub", "sub_"), _add),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _multiply),
    **dict.fromkeys(("pow", "square"), _power),
    **dict.fromkeys(("var", "var_mean", "std"), _spread),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _length),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _normalise),
    **dict.fromkeys(("where", "masked_fill", "masked_fill_"), _choose),
}


def _name(node: Node) -> str:
    return operator_name(node.target) or getattr(node.target, "__name__", str(node.target))


__all__ = ["Key", "Norm", "Stream", "Use", "stream_of"]
