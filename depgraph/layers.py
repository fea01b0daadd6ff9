"""The layers of a model in order of execution, and the places where additions and attentions join them.

A *layer* is a parameter of two dims or more at the operator where it first meets data. All is read from the captured
graph: which operators contract, add, look up or take a softmax; names only say where that happens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from depgraph.graph import Value
from depgraph.joins import is_node, name_of
from depgraph.operators import argument

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_FAR = 16  # operators between a softmax and the products before and after it
_LOOKUPS = ("index", "unsafe_index", "index_select", "gather", "embedding")
_COPIES = ("to", "to_copy", "clone", "contiguous", "detach", "alias", "dropout")


@dataclass(frozen=True)
class Layer:
    """A weight where it is used. `out` and `into` are ids of dims (None where it has no such side), `beside` its other dims.

    MACs are the operator's, or the weight's share of them where the operator takes several weights one by one.
    """

    name: str
    target: str
    op: str
    out: int | None
    into: int | None
    params: int
    macs: int
    groups: int = 1
    beside: tuple[int, ...] = ()

    @property
    def convolves(self) -> bool:
        return "conv" in self.op

    @property
    def places(self) -> tuple[int, ...]:
        """Dims along which whole weights are stacked or rows looked up."""
        looked_up = () if self.into is None or self.op not in _LOOKUPS else (self.into,)
        return (*self.beside, *looked_up)

    @property
    def recurs(self) -> bool:
        return self.op.partition("_")[0] in ("lstm", "gru", "rnn")


@dataclass(frozen=True)
class Attention:
    """softmax(q kᵀ) v in one module: ids of the dims of heads (and batch), of the width of q and k, of the width of v.

    `keys` are the layers that make k.
    """

    module: str
    lead: tuple[int, ...]
    width: int
    values: int
    keys: frozenset[str]


class Anatomy:
    """What the graph of a model says about its layers.

    `layers` are in order of execution; `streams` has the classes of dims along which what layers computed is added to
    what they computed it from (a residual stream), `turned` those of sines and cosines.
    """

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self.program = graph.capture.program
        self.nodes: list[Node] = graph.nodes
        self.index = {node: k for k, node in enumerate(self.nodes)}
        self.layers: list[Layer] = []
        self.attentions: list[Attention] = []
        self.streams: set[int] = set()
        self.turned: set[int] = set()
        self._known: set[str] = set()
        self._static: dict[Node, frozenset[str]] = {}
        self._made_by: dict[Node, frozenset[str]] = {}
        self._contracted: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self._products: dict[tuple[str, str, int], int] = {}
        for c in self.program.relations.contractions:
            self._contracted[c.op].append((c.operand, c.dim))
            self._products[c.op, c.operand, c.dim] = c.product
        self._work: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for work in self.program.relations.work:
            self._work[work.op].append(work.dims)
        self._parameters = {v.target: v for v in self.program.values.values() if v.kind == "parameter" and v.target}
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name, first in self.program.ties.items():
            self._alike[first].append(name)
        self._order = {target: k for k, target in enumerate(self._parameters)}
        self._owned: dict[str, int] = defaultdict(int)
        for target, rank in graph.parameter_ranks().items():
            self._owned[target.rpartition(".")[0]] += rank > 1
        for node in self.nodes:
            self._read(node)
        for node in self.nodes:
            self.attentions += self._attention(node)

    def class_of(self, dim: int) -> int:
        return self.graph.widths.class_of(dim)

    def size(self, dim: int) -> int:
        return self.program.relations.sizes[dim]

    def _value(self, node: Node) -> Value | None:
        return self.program.values.get(node.name)

    def _classes(self, value: Value | None) -> set[int]:
        """The classes of the dims of a value that are wider than one."""
        return {self.class_of(d) for d in value.dims if self.size(d) > 1} if value is not None else set()

    def _read(self, node: Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            value = self._value(node)
            if value is None or value.kind != "input":
                wide = value is not None and value.kind == "parameter" and len(value.shape) > 1
                self._static[node] = frozenset({value.target} if wide and value is not None else ())
        elif node.op == "call_function":
            self._call(node)

    def _call(self, node: Node) -> None:
        fed = [n for n in node.all_input_nodes if n not in self._static]
        held = frozenset[str]().union(*(self._static[n] for n in node.all_input_nodes if n in self._static))
        if name_of(node) in ("sin", "cos"):
            self.turned |= self._classes(self._value(node))
        if not fed or not any(isinstance(n.meta.get("val"), (torch.Tensor, tuple, list)) for n in fed):
            self._static[node] = held
            return
        found = (self._layer(node, self._parameters[target]) for target in sorted(held, key=self._order.__getitem__))
        new = [layer for layer in found if layer is not None and layer.name not in self._known]
        self.layers += new
        self._known.update(layer.name for layer in new)
        if held and (self._contracted[node.name] or name_of(node) in ("embedding", "embedding_bag")):
            self._made_by[node] = held
            return
        self._made_by[node] = frozenset[str]().union(*(self._made_by.get(n, ()) for n in fed))
        if name_of(node) == "add" and len(fed) == 2:
            self._join(node, *fed)

    def _layer(self, node: Node, weight: Value) -> Layer | None:
        made = {n.name for n in node.all_input_nodes if n not in self._static}
        met = self._met_by(node, weight)
        sums = [(self.program.values[name].dim(d), name in made) for name, d in met]
        own = {self.class_of(weight.dim(d)) for name, d in self._contracted[node.name] if name == weight.name}
        summed = own or {self.class_of(dim) for dim, of_data in sums if not of_data}
        wide = [d for d in weight.dims if self.size(d) > 1]
        if len(wide) < 2 and not summed & self._classes(weight):
            return None
        outer = [d for d in wide if self.class_of(d) not in summed]
        given = set[int]().union(*(self._classes(v) for v in self._results(node)))
        shown = [d for d in outer if self.class_of(d) in given]
        out = max(shown, key=lambda d: (bool(self.graph.widths.axes_of(d)), d)) if shown else next(iter(outer), None)
        rows = [d for d in outer if d not in shown]
        read = [*(dim for dim, of_data in sums if of_data), *(d for d in wide if d not in outer)] if sums else rows
        into = next(iter(read), None)
        sides = {self.class_of(d) for d in (out, into) if d is not None}
        target, cost = self._known_as(node, weight.target), (prod(weight.shape), self._macs(node, weight))
        beside = tuple(d for d in wide if self.class_of(d) not in sides)
        return Layer(self._called(target), target, name_of(node), out, into, *cost, argument(node, "groups", 1), beside)

    def _met_by(self, node: Node, weight: Value) -> list[tuple[str, int]]:
        """What is summed over in the products that a weight takes part in; in all of the operator's where it isn't seen in any."""
        summed = self._contracted[node.name]
        own = {self._products[node.name, name, d] for name, d in summed if name == weight.name}
        return [(name, d) for name, d in summed if not own or self._products[node.name, name, d] in own]

    def _macs(self, node: Node, weight: Value) -> int:
        """What the operator multiplies and adds up with the weight; all it does, unless it says so for each weight."""
        done = self._work[node.name]
        own = [dims for dims in done if set(weight.dims) <= set(dims)]
        return sum(prod(map(self.size, dims)) for dims in own or done)

    def _called(self, target: str) -> str:
        """The name of a layer: its module's where that holds but this weight and no other modules."""
        owner = target.rpartition(".")[0]
        alone = owner and self._owned[owner] == 1 and not self.graph.has_parts(owner)
        return owner if alone else target

    def _known_as(self, node: Node, target: str) -> str:
        """The name of a parameter in the module that uses it here: a tied one has several."""
        first, module = self.program.ties.get(target, target), self._module(node)
        return next((name for name in self._alike[first] if name.rpartition(".")[0] == module), target)

    def _results(self, node: Node) -> Iterator[Value]:
        values = self.program.values
        yield from (values[n] for n in (node.name, f"{node.name}:0", f"{node.name}:1") if n in values)

    def _join(self, node: Node, a: Node, b: Node) -> None:
        left, right = self._made_by.get(a, frozenset()), self._made_by.get(b, frozenset())
        if left and right and left != right and (self._above(a, b) or self._above(b, a)):
            self.streams |= self._classes(self._value(node))

    def _above(self, upper: Node, lower: Node) -> bool:
        """Is `lower` computed from `upper`, or from what that is a copy of?"""
        while name_of(upper) in _COPIES and len(upper.all_input_nodes) == 1:
            upper = upper.all_input_nodes[0]
        first, seen, queue = self.index[upper], {lower}, [lower]
        while queue:
            for node in queue.pop().all_input_nodes:
                if node is upper:
                    return True
                if node not in seen and self.index[node] > first:
                    seen.add(node)
                    queue.append(node)
        return False

    def _attention(self, node: Node) -> Iterator[Attention]:
        value = self._value(node)
        if value is None or len(value.shape) < 2:
            return
        if "scaled_dot_product" in str(node.target):
            q, k, v = (argument(node, name) for name in ("query", "key", "value"))
            if is_node(q) and is_node(k) and is_node(v):
                query, values = self.program.values[q.name], self.program.values[v.name]
                lead = tuple(query.dims[:-2])
                yield Attention(self._module(node), lead, query.dim(-1), values.dim(-1), self._keys(k))
        elif name_of(node) in ("softmax", "special_softmax", "safe_softmax"):
            yield from self._by_hand(node, value)

    def _by_hand(self, node: Node, scores: Value) -> Iterator[Attention]:
        """An attention as a product, a softmax over one of its dims and a product that sums over the same."""
        along = self._joined(self.class_of(scores.dim(argument(node, "dim", -1))))
        before, after = self._product(node, along, up=True), self._product(node, along, up=False)
        if before is None or after is None:
            return
        weights = self._classes(scores) | along
        widths = [
            d
            for name, _ in self._contracted[after.name]
            for d in self.program.values[name].dims
            if self.class_of(d) not in weights and self.size(d) > 1
        ]
        name, summed = self._contracted[before.name][0]
        keys = frozenset[str]().union(*(self._keys(n) for n in before.all_input_nodes[1:]))
        if widths:
            width = self.program.values[name].dim(summed)
            yield Attention(self._module(node), tuple(scores.dims[:-2]), width, widths[-1], keys)

    def _joined(self, number: int) -> set[int]:
        """A class of dims with those that are parts of it: what it was joined from, or what is cut out of it."""
        return {number, *(other for _, other, _ in self.graph.classes.pushes.get(number, ()))}

    def _product(self, node: Node, along: set[int], *, up: bool) -> Node | None:
        """The nearest product before (after) `node` that makes (sums over) a dim of one of the classes `along`."""
        queue, seen = [node], {node}
        while queue and len(seen) < 4 * _FAR:
            here = queue.pop(0)
            for other in here.all_input_nodes if up else here.users:
                if other in seen or other in self._static:
                    continue
                seen.add(other)
                sums = self._contracted[other.name]
                classes = {self.class_of(self.program.values[name].dim(d)) for name, d in sums}
                if sums and along & (self._classes(self._value(other)) if up else classes):
                    return other
                queue.append(other)
        return None

    def _keys(self, node: Node) -> frozenset[str]:
        return self._made_by.get(node, frozenset())

    def _module(self, node: Node) -> str:
        value = self._value(node)
        return value.module if value is not None else ""


def block_of(name: str) -> str:
    """The repeated module that a layer lies in: its name up to the first part that ends with a number."""
    parts = name.split(".")[:-1]
    k = next((k for k, part in enumerate(parts) if part[-1:].isdecimal()), None)
    return "" if k is None else ".".join(parts[: k + 1])
