"""Which of some nodes each node of a graph is computed from: found in one pass over the graph for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import and_

from torch.fx import Node


class Descent:
    """What every node is computed from among `sources`, as the bits of one number for each node.

    `inputs` has all nodes of the graph in order of execution, with what each reads.
    """

    def __init__(self, inputs: Mapping[Node, Sequence[Node]], sources: Iterable[Node]) -> None:
        self._place = {node: place for place, node in enumerate(sources)}
        self._from: dict[Node, int] = {}
        own = {node: 1 << place for node, place in self._place.items()}
        for node, above in inputs.items():
            self._from[node] = 0
            for read in above:
                self._from[node] |= self._from[read] | own.get(read, 0)

    def among(self, sources: Iterable[Node], nodes: Iterable[Node]) -> list[Node]:
        """Those of some of the sources that each of `nodes` is computed from; there is one of these at the least."""
        common = reduce(and_, (self._from[node] for node in nodes))
        return [source for source in sources if common >> self._place[source] & 1]
