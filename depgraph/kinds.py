"""What parts of a captured graph do: their multiply-accumulates, and whether they attend, convolve or do neither."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod

from torch.fx import Node

from depgraph.graph import Program
from depgraph.joins import Flow, given, is_floating, is_node, name_of, shape_of

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

    def works(self, node: Node) -> bool:
        """Does an operator do more than to move numbers, or to compute with each alone?"""
        return node in self.flow.moving and (self.work[node.name] > 0 or any(m in name_of(node) for m in _MIXERS))

    def macs(self, nodes: Iterable[Node]) -> int:
        """What nodes multiply and add."""
        return sum(self.work[node.name] for node in nodes)

    def of(self, nodes: Iterable[Node]) -> str:
        """Either "attention", "convolution", "mlp" (products with weights, and what is computed with each number alone) or "other"."""
        own = list(nodes)
        if self.attends(own):
            return "attention"
        done = self.macs(own)
        spread = [n for n in own if self._spreads(n)]
        if any(len(shape_of(n) or ()) > 3 for n in spread) or 2 * self.macs(spread) > done > 0:
            return "convolution"
        if not done or any(name_of(n).startswith(_RECURRENT) or self._of_data(n) for n in own):
            return "other"
        return "convolution" if spread else "mlp"

    def mixes(self, nodes: Iterable[Node]) -> bool:
        """Does anything attend, recur, spread over several places or multiply data with data?"""
        own = list(nodes)
        if any(name_of(n).startswith((*_RECURRENT, "cumsum")) for n in own if n in self.flow.moving):
            return True
        return self.attends(own) or any(self._spreads(n) or self._of_data(n) for n in own)

    def attends(self, own: list[Node]) -> bool:
        """Is there a softmax between a product of data and another that sums over it, or one operator that is all that?"""
        if any("scaled_dot_product" in str(n.target) or "attention" in name_of(n) for n in own):
            return True
        products = [n for n in own if self._of_data(n)]
        for softmax in (n for n in own if "softmax" in name_of(n)):
            before = any(softmax in self.flow.between(p, (softmax,)) for p in products)
            if before and any(p in self.flow.between(softmax, (p,)) for p in products):
                return True
        return False

    def _spreads(self, node: Node) -> bool:
        """Is an operator a convolution over more than one place?"""
        weight = given(node, "weight", None) if "conv" in name_of(node) else None
        return is_node(weight) and prod((shape_of(weight) or ())[2:]) > 1

    def _of_data(self, node: Node) -> bool:
        """Does an operator multiply data with data and sum up?"""
        moving = [n for n in node.all_input_nodes if n in self.flow.moving and is_floating(n)]
        return self.work[node.name] > 0 and len(moving) > 1 and node.name in self.summing
