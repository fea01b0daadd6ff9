"""Blocks of a file whose names tell of none: stretches of its stream that do the same one after the other.

Branches that are alike, or groups of them, follow one another along a stream. What lies between the places where two such groups
start is a block; where the last one ends is told by what comes after the last addition of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from depgraph.blocks import Block
from depgraph.joins import name_of, shape_of
from depgraph.paths import common_path
from depgraph.residual import Branch, Branches, unique


class Stretches:
    """What `depgraph.blocks.Blocks` is for entries of containers: the blocks `found`, and why others can't go (`refused`)."""

    def __init__(self, residual: Branches) -> None:
        self.residual = residual
        self.flow = residual.flow
        self.named: dict[str, Any] = {node.name: node for node in self.flow.nodes}
        self.refused: dict[str, str] = {}
        self.likeness = [self._likeness(branch) for branch in residual.found]
        found = [self._blocks(k, *run) for k, run in enumerate(self._runs(0, len(residual.found)))]
        self.found = self._called([block for blocks in found for block in blocks])

    def _likeness(self, branch: Branch) -> tuple[Any, ...]:
        """What a branch does: its kind, its operators, and the shapes of what it holds and of its stream."""
        operators = Counter(name_of(self.named[name]) for name in branch.nodes)
        shapes = sorted(self.residual.shape_of(name) for name in branch.parameters)
        return branch.kind, frozenset(operators.items()), tuple(shapes), shape_of(self.named[branch.add])

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Where repetitions start, how many branches one has, and how many there are; the longest first, then what is beside it."""
        best = max(self._repetitions(start, end), key=lambda run: (run[1] * run[2], run[2]), default=None)
        if best is None:
            return
        first, period, times = best
        yield from self._runs(start, first)
        yield best
        yield from self._runs(first + period * times, end)

    def _repetitions(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """All repetitions of two or more."""
        for period in range(1, (end - start) // 2 + 1):
            for first in range(start, end - 2 * period + 1):
                times = 1
                while first + period * (times + 1) <= end and self._alike(first, first + period * times, period):
                    times += 1
                if times > 1 and self._is_chain(first, period, times):
                    yield first, period, times

    def _alike(self, a: int, b: int, period: int) -> bool:
        return self.likeness[a : a + period] == self.likeness[b : b + period]

    def _is_chain(self, first: int, period: int, times: int) -> bool:
        """Does each group start in what the one before it ends with, with no work in between?"""
        found = self.residual.found
        starts = [found[k] for k in range(first, first + period * times, period)]
        ends = [found[k + period - 1] for k in range(first, first + period * (times - 1), period)]
        return all(self._follows(end, start) for end, start in zip(ends, starts[1:], strict=True))

    def _follows(self, before: Branch, after: Branch) -> bool:
        top, source = self.flow.top(self.named[before.add]), self.named[after.source]
        if source is self.flow.original(top):
            return True
        between = self.flow.between(top, (source,))
        return bool(between) and not any(map(self.residual.works, between))

    def _blocks(self, number: int, first: int, period: int, times: int) -> list[Block]:
        """The blocks of a repetition."""
        groups = [self.residual.found[k : k + period] for k in range(first, first + period * times, period)]
        ends = [self.named[after[0].source] for _, after in pairwise(groups)]
        last = self._end(groups[0], ends[0], groups[-1])
        made = []
        for k, (group, end) in enumerate(zip(groups, [*ends, last], strict=True)):
            name, source = f"blocks{number + 1 if number else ''}.{k}", self.named[group[0].source]
            block = None if end is None else self._block(name, group, (source, end))
            if block is None:
                self.refused[name] = (
                    "more than its stream leaves it, or its last branch isn't followed by what follows the others"
                )
            else:
                made.append(block)
        return made

    def _end(self, group: tuple[Branch, ...], end: Any, last: tuple[Branch, ...]) -> Any | None:
        """What the last group ends with: what is computed from its last addition as `end` is from that of `group`."""
        top, here = (self.flow.top(self.named[one[-1].add]) for one in (group, last))
        if end is self.flow.original(top):
            return self.flow.original(here)
        same = {top: here}
        for node in sorted(self.flow.between(top, (end,)), key=self.flow.index.__getitem__):
            given = [n for n in node.all_input_nodes if n in self.flow.moving]
            users = same[given[0]].users if given and all(n in same for n in given) else ()
            twin = next(
                (u for u in users if u not in same.values() and self._is_twin(node, u, [same[n] for n in given])), None
            )
            if twin is None:
                return None
            same[node] = twin
        return same.get(end)

    def _is_twin(self, node: Any, other: Any, given: list[Any]) -> bool:
        fed = [n for n in other.all_input_nodes if n in self.flow.moving]
        return name_of(node) == name_of(other) and shape_of(node) == shape_of(other) and fed == given

    def _block(self, name: str, group: tuple[Branch, ...], ends: tuple[Any, Any]) -> Block | None:
        source, output = ends
        inside = self.flow.between(source, (output,))
        own = {self.named[n] for branch in group for n in (branch.add, *branch.operands)}
        stray = any(not inside.issuperset(self.flow.readers[n] - self.flow.unread) for n in inside - {output})
        if stray or not own <= inside or shape_of(source) != shape_of(output):
            return None
        parted = {(node, output) for node in self.flow.read[output]} | set(self.flow.passed(output, source))
        gone = self.flow.dead(parted, {source: {output}}) | {output}
        parameters = self.residual.parameters(gone)
        return Block(
            name,
            name.rpartition(".")[0],
            int(name.rpartition(".")[2]),
            tuple(branch.name for branch in group),
            tuple(node.name for node in sorted(gone, key=self.flow.index.__getitem__)),
            source.name,
            output.name,
            parameters,
            self.residual.size(parameters),
            self.residual.macs(gone),
            0,
        )

    def _called(self, blocks: list[Block]) -> tuple[Block, ...]:
        """The blocks in order, under the names of the places that they lie in where each has one of its own."""
        blocks = sorted(blocks, key=lambda block: self.flow.index[self.named[block.output]])
        working = [[n for name in block.nodes if self.residual.works(n := self.named[name])] for block in blocks]
        places = [common_path(map(self.residual.module, nodes)) for nodes in working]
        taken = {branch.name for branch in self.residual.found}
        if "" in places or len(set(places)) < len(places) or not taken.isdisjoint(places):
            places = unique([(block.name, "block") for block in blocks], taken)
        return tuple(
            replace(block, name=place, order=k) for k, (block, place) in enumerate(zip(blocks, places, strict=True))
        )
