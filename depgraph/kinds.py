"""What parts of a captured graph do: their multiply-accumulates, and whether they attend, convolve or do neither."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from math import prod

from torch.fx import Node

from depgraph.graph import Program
from depgraph.joins import Flow, is_floating, is_node, name_of, shape_of
from depgraph.operators import argument

_RECURRENT = ("lstm", "gru", "rnn")
_MIXERS = ("pool", "fft")  # operators without weights that a branch may consist of


class Kinds:
    """The work of each node of a graph, and the kind of a set of nodes by what is computed in it."""

    def __init__(self, program: Program, flow: Flow) -> None:
        self.flow = flow
        self.work: dict[str, int] = defaultdict(int)
        for work in program.relations.work:
            self.work[work.op] += prod(program.relations.sizes[d] for d in work.dims)
        self.summing = {c.op for c in program.relations.contractions}
        self.working = self._all(self._works)
        self.counted = self._all(lambda n: self.work.get(n.name, 0) > 0)
        self.products = self._all(self._of_data)
        self.spread = self._all(self._spreads)
        self.softmaxes = self._all(lambda n: "softmax" in name_of(n))
        self.attending = self._all(lambda n: "scaled_dot_product" in str(n.target) or "attention" in name_of(n))
        self.recurrent = self._all(lambda n: name_of(n).startswith(_RECURRENT))
        self.accumulating = self._all(lambda n: name_of(n).startswith((*_RECURRENT, "cumsum")) and n in flow.moving)

    def _all(self, fits: Callable[[Node], bool]) -> frozenset[Node]:
        """The nodes of the graph that something holds of; sets of nodes are compared with these whole."""
        return frozenset(filter(fits, self.flow.nodes))

    def works(self, node: Node) -> bool:
        """Does an operator do more than to move numbers, or to compute with each alone?"""
        return node in self.working

    def _works(self, node: Node) -> bool:
        return node in self.flow.moving and (self.work[node.name] > 0 or any(m in name_of(node) for m in _MIXERS))

    def macs(self, nodes: Iterable[Node]) -> int:
        """What nodes multiply and add."""
        return sum(self.work[node.name] for node in self.counted.intersection(nodes))

    def of(self, nodes: Iterable[Node]) -> str:
        """Either "attention", "convolution", "mlp" (products with weights, and what is computed with each number alone) or "other"."""
        own = frozenset(nodes)
        if self.attends(own):
            return "attention"
        done, spread = self.macs(own), own & self.spread
        if any(len(shape_of(n) or ()) > 3 for n in spread) or 2 * self.macs(spread) > done > 0:
            return "convolution"
        if not done or own & self.recurrent or own & self.products:
            return "other"
        return "convolution" if spread else "mlp"

    def mixes(self, nodes: Iterable[Node]) -> bool:
        """Does anything attend, recur, spread over several places or multiply data with data?"""
        own = frozenset(nodes)
        return bool(own & (self.accumulating | self.spread | self.products)) or self.attends(own)

    def attends(self, own: frozenset[Node]) -> bool:
        """Is there a softmax between a product of data and another that sums over it, or one operator that is all that?"""
        if own & self.attending:
            return True
        products = own & self.products
        for softmax in own & self.softmaxes if products else ():
            before = any(softmax in self.flow.between(p, (softmax,)) for p in products)
            if before and any(p in self.flow.between(softmax, (p,)) for p in products):
                return True
        return False

    def _spreads(self, node: Node) -> bool:
        """Is an operator a convolution over more than one place?"""
        weight = argument(node, "weight", None) if "conv" in name_of(node) else None
        return is_node(weight) and prod((shape_of(weight) or ())[2:]) > 1

    def _of_data(self, node: Node) -> bool:
        """Does an operator multiply data with data and sum up?"""
        moving = [n for n in node.all_input_nodes if n in self.flow.moving and is_floating(n)]
        return self.work[node.name] > 0 and len(moving) > 1 and node.name in self.summing
