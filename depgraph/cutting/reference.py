"""The captured program run on the original weights, as if a plan were applied: the other side of the check.

A program is run on several *sides* at once, an operator at a time. On each side some axes are cut and others stay, filled
with zeros where an operator contracts over them, which is where removed groups would feed the rest. With nothing cut,
that is the original with the consumers' columns zeroed; with nothing zeroed either, the original itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.cutting.choices import Picks, chosen_alike
from depgraph.cutting.draws import Draws, Redrawing
from depgraph.cutting.script import Script
from depgraph.cutting.sides import Called, Side, SideRun, filled
from depgraph.cutting.slicing import sliced_tensor
from depgraph.graph import Program, Value
from depgraph.widths import Kept

_COPY = torch.ops.aten.index_select.default
Fetch = Callable[[str], torch.Tensor]
Outputs = list[tuple[Value, torch.Tensor]]
Watch = Mapping[Node, Callable[[Node, SideRun], None]]


class Following(NamedTuple):
    """What the pruned model, cut to `kept`, chose and drew; `tolerance`: how much worse such a choice may be."""

    picks: Picks
    tolerance: float
    drawn: Draws
    kept: Kept | None

    def chosen(self, node: Node, call: Called, made: Any) -> Any:
        """What `node` made, with the pruned model's choices where they are as good."""
        return chosen_alike(node.target, (call.args, call.kwargs), made, self.picks[node], self.tolerance)


class Reference:
    """A captured program that can be run with some axes sliced and others zeroed.

    What is the same on all sides is computed once, and one weight times the rows of several sides is one product, so
    that weights are read from memory once. The first side chooses as `follow` says, and is shown to `watch` after each of the
    nodes that it has. `only` names what is computed: then there are no outputs.
    """

    def __init__(
        self,
        script: Script,
        program: Program,
        sides: Sequence[Side],
        follow: Following | None = None,
        *,
        watch: Watch | None = None,
        only: frozenset[Node] | None = None,
    ) -> None:
        self.script = script
        self.program = program
        self.follow = follow or Following({}, 0.0, Draws(), None)
        self.watch = watch or {}
        self.only = only
        self.sides = [SideRun(side, program, script) for side in sides]
        self.apart = self._apart()

    def _apart(self) -> set[Node]:
        """The nodes that the sides don't share: what differs between them, and memory that such a node writes to."""
        nodes = self.script.nodes if any(side.masks or side.cutting for side in self.sides) else []
        found = {node for node in nodes if any(side.differs(node) for side in self.sides)}
        size = -1
        while size < len(found):
            size = len(found)
            for node in nodes:
                if node in found:
                    found.update(node.users)
            found.update(write.root for write in self.script.writes if write.writer in found)
        return found

    def run(self, fetch: Fetch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Outputs]:
        """The program's tensor outputs with their values, for each side; `fetch` gives a tensor of the original by name."""
        running = self.steps(fetch, args, kwargs, frozenset())
        while True:
            try:
                next(running)
            except StopIteration as done:
                outputs: list[Outputs] = done.value
                return outputs

    def steps(
        self, fetch: Fetch, args: tuple[Any, ...], kwargs: Mapping[str, Any], pause: frozenset[Node]
    ) -> Generator[Node, None, list[Outputs]]:
        """As `run`, stopping before each node of `pause`, which it yields; what the first side made is in its `env` then."""
        script, only, watch, sides = self.script, self.only, self.watch, self.sides
        given = iter(pytree.tree_leaves((args, dict(kwargs))))
        late = script.late.difference(watch)
        first, dead = script.first, script.dead
        for node in script.nodes:
            for weight in first.get(node, ()):
                if weight in late:
                    self._hold(weight, fetch(str(script.targets[weight.name])), True)
            if node in pause:
                yield node
            if node.op == "call_function":
                if only is None or node in only:
                    self._run(node)
            elif node in late:
                continue
            elif node.op == "placeholder":
                target = script.targets[node.name]
                self._hold(node, next(given) if target is None else fetch(target), target is not None)
            elif node.op == "get_attr":
                self._put(node, getattr(script.exported.graph_module, str(node.target)))
            elif node.op == "output":
                outputs = [self._outputs(script.outputs if only is None else [], side) for side in sides]
            if node in watch:
                watch[node](node, sides[0])
            for gone in dead.get(node, ()):
                for side in sides:
                    side.env.pop(gone, None)
        return outputs

    def _outputs(self, nodes: list[Node], side: SideRun) -> Outputs:
        found = [(n, side.cut(n)) for n in nodes]
        return [(self.program.values[n.name], made) for n, made in found if isinstance(made, torch.Tensor)]

    def _hold(self, node: Node, tensor: Any, stored: bool) -> None:
        """Give a tensor from outside to all sides: a copy if it is written to, one for each where they don't share it."""
        written = node in self.script.roots
        self._put(node, tensor.clone() if written else tensor)
        for side in self.sides:
            if stored:
                side.stored.add(node)
            if written and node in self.apart:
                side.hold(node, tensor)

    def _put(self, node: Node, made: Any) -> None:
        """The same on all sides."""
        for side in self.sides:
            side.env[node] = made

    def _run(self, node: Node) -> None:
        if node not in self.apart:
            self._put(node, self._alike(node))
            return
        calls = [side.call(node) for side in self.sides]
        made = self._drawn(node, calls) if node in self.script.drawing else self._made(node, calls)
        if node in self.follow.picks:
            first, others = made[0], made[1:]
            made = [self.follow.chosen(node, calls[0], first), *others]
        for call, side, result in zip(calls, self.sides, made, strict=True):
            side.env[node] = (
                sliced_tensor(result, side.sliced, self.program.values[node.name]) if call.whole else result
            )
            if call.target is _COPY and node.target is not _COPY:
                side.copies[node] = call.args
            for view in self.script.written_through.get(node, ()) if side.copies else ():
                side.write_back(view)

    def _alike(self, node: Node) -> Any:
        """What a node makes that is the same on all sides."""
        if node in self.script.drawing:
            return self._drawn(node, [self.sides[0].call(node)])[0]
        args, kwargs = filled(node, self.sides[0].env, node in self.script.plain)
        return self.script.cheaper.get(node, node.target)(*args, **kwargs)  # type: ignore[operator]

    def _made(self, node: Node, calls: list[Called]) -> Sequence[Any]:
        """What `calls` make; the rows of all sides at once where they are multiplied with the same weight."""
        at = self.script.rows.get(node) if len(calls) > 1 else None
        return [call.make() for call in calls] if at is None else _in_one_product(at, calls)

    def _drawn(self, node: Node, calls: list[Called]) -> list[Any]:
        """What operators draw: the same numbers on each side, the pruned model's where that keeps them."""
        before, made = torch.get_rng_state(), []
        following, values = self.follow, self.program.values
        first = f"{node.name}:0"  # of several results the first is as large as what is drawn
        value = values.get(node.name) or values.get(first)
        mode: Any = contextlib.nullcontext()
        for call, side in zip(calls, self.sides, strict=False):
            torch.set_rng_state(before)
            if value is not None and following.kept is not None:
                mode = Redrawing(following.drawn, value, side.sliced, following.kept)
            with mode:
                made.append(call.make())
        following.drawn.taken = getattr(mode, "position", None)
        return made


def _in_one_product(at: int, calls: list[Called]) -> Sequence[Any]:
    """What `calls` make, which take operand `at` row by row; in one product where the others are the same."""
    first = calls[0]
    if any(len(call.args) <= at for call in calls):
        return [call.make() for call in calls]
    rows = [call.args[at] for call in calls]
    others = [[*call.args[:at], *call.args[at + 1 :], *call.kwargs.values()] for call in calls]
    same = all(len(o) == len(others[0]) and all(a is b for a, b in zip(o, others[0], strict=True)) for o in others)
    weight = first.args[at + 1]
    added = [one for one in others[0] if isinstance(one, torch.Tensor) and one is not weight]
    apart = weight.ndim != 2 or any(one.ndim > 1 for one in added)
    if not same or apart or any(r.ndim < 2 or r.shape[1:] != rows[0].shape[1:] for r in rows):
        return [call.make() for call in calls]
    joined = first._replace(args=(*first.args[:at], torch.cat(rows), *first.args[at + 1 :]))
    return joined.make().split([len(r) for r in rows])
