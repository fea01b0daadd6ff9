"""Running a traced model on other inputs, an operator at a time, and looking at what its operators are given.

The captured program is run, not the module: so everything that the graph knows of can be watched, in any architecture, a
weight is fetched when it is needed and let go after, and the model itself stays as it is. For inputs of other shapes than the
example's the model is captured again (without weights), once for each shape, and the last captures are kept by the graph; a
model whose code depends on values is captured for every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import Capture, dumps_dropped, quiet
from depgraph.capture.exported import CapturedProgram, DirectProgram, decisions_of
from depgraph.capture.holding import held_by
from depgraph.capture.lowering import lower
from depgraph.capture.recording import record, record_decided
from depgraph.capture.unfit import may_be_unfit, unfit
from depgraph.consumers import Meeting
from depgraph.cutting.draws import same_draws
from depgraph.cutting.reference import Outputs, Reference, Watch
from depgraph.cutting.sides import Side, SideRun
from depgraph.errors import DataError, unfit_batch
from depgraph.offloading import at_rest
from depgraph.origins import Factors
from depgraph.runnable import Runnable, own_of

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Watcher = Callable[["Met"], None]
Seen = Mapping[str, Callable[[torch.Tensor], None]]
Shapes = tuple[Any, ...]
_MOST = 64  # captures that a graph keeps
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Met(NamedTuple):
    """What came together in a `meeting`: its operand, and the other operand; without gradients. `node` is the operator.

    `same`: is the capture, as far as its nodes go, the graph's own, so that what met before meets again? `operand_from` and
    `other_from` say what the dims of these come from, as far as that is known: `depgraph.origins`.
    """

    meeting: Meeting
    operand: torch.Tensor
    other: torch.Tensor
    node: Node
    same: bool = False
    operand_from: tuple[Factors, ...] = ()
    other_from: tuple[Factors, ...] = ()


Steps = Generator[Met, torch.Tensor | None, None]
"""Where a run stands, stop by stop; what is sent is what the operator is given in the place of the operand that was shown."""


class Observer:
    """Runs the model of a graph on batches of any shape; `fetch` gives a tensor of the model by name."""

    def __init__(self, graph: DependencyGraph, fetch: Callable[[str], torch.Tensor] | None = None) -> None:
        self.graph = graph
        self.tensors = fetch or graph.tensors().__getitem__
        self._last: _Shower | None = None

    @property
    def own(self) -> Runnable:
        """The capture that the graph was made of."""
        return own_of(self.graph)

    @property
    def pausable(self) -> list[Meeting]:
        """The products that `steps` can stop before."""
        return self.own.meetings

    @cached_property
    def _by_values(self) -> bool:
        decisions = decisions_of(self.graph.capture.exported)
        return decisions is not None and not decisions.settled

    def runnable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Runnable:
        """The capture for inputs of these shapes.

        Raises DataError when the model can't be captured on them.
        """
        if self._by_values:
            return self._capture(args, kwargs)
        key, captures = shapes_of(args, kwargs), self.graph.captures
        if key == shapes_of(self.graph.args, self.graph.kwargs):
            return self.own
        if key not in captures:
            captures[key] = self._capture(args, kwargs)
            for oldest in list(captures)[:-_MOST]:
                del captures[oldest]
        return captures[key]

    def run(
        self, inputs: Inputs, watch: Watcher | None = None, seen: Seen | None = None, side: Side | None = None
    ) -> Outputs:
        """Run one batch and give every product with two operands to `watch`, and values to what `seen` has under their names.

        `side` says what is zeroed meanwhile; values can be seen in a capture with the graph's own nodes only.

        Raises DataError when an input points beyond a table, or the model can't be captured on inputs of these shapes.
        """
        found, side = self._ready(inputs, seen, side)
        return self._outputs(found, inputs, side, self._shower(found, watch, seen).watch)

    def watch(
        self, inputs: Inputs, watch: Watcher | None = None, seen: Seen | None = None, side: Side | None = None
    ) -> None:
        """As `run`, without what nothing that is looked at is computed from: a language model's last product, say."""
        found, side = self._ready(inputs, seen, side)
        shower = self._shower(found, watch, seen)
        self._outputs(found, inputs, side, shower.watch, shower.behind)

    def _shower(self, found: Runnable, watch: Watcher | None, seen: Seen | None) -> _Shower:
        """What shows a batch; the last one where it would be the same."""
        last = self._last
        if seen or last is None or last.seen or last.found is not found or last.watcher is not watch:
            last = self._last = _Shower(found, watch, seen or {})
        return last

    def _ready(self, inputs: Inputs, seen: Seen | None, side: Side | None) -> tuple[Runnable, Side]:
        """The capture for a batch that fits, and what is zeroed."""
        found, whole = self.runnable(*inputs), self.graph.widths.at({})
        self._require_within(found, *inputs)
        if side is not None or seen:
            self._require_same(found)
        return found, side or Side(whole, whole)

    def _outputs(
        self, found: Runnable, inputs: Inputs, side: Side, watch: Watch, only: frozenset[Node] | None = None
    ) -> Outputs:
        reference = Reference(found.script, found.program, [side], watch=watch, only=only)
        with torch.no_grad(), same_draws():
            (outputs,) = reference.run(lambda name: self._fetch(found, name), *inputs)
        return outputs

    def look(self, found: Runnable, inputs: Inputs, watch: Watch) -> None:
        """Run one batch in its capture (`runnable`) and call what `watch` has for nodes once these are made.

        Raises DataError as `run` does.
        """
        (args, kwargs), whole = inputs, self.graph.widths.at({})
        self._require_within(found, args, kwargs)
        self._outputs(found, inputs, Side(whole, whole), watch)

    def call(self, inputs: Inputs, side: Side | None = None) -> Any:
        """What the model returns for one batch, in the model's own structure, with what `side` says zeroed or cut meanwhile.

        Raises DataError as `run` does.
        """
        found = self.runnable(*inputs)
        return found.structured([made for _, made in self.run(inputs, side=side)])

    def _require_same(self, found: Runnable) -> None:
        if not found.same:
            raise DataError(
                f"{type(self.graph.model).__name__} takes another way on a batch than on the example that it was traced with: trace "
                "it on such a batch"
            )

    def steps(self, inputs: Inputs, pause: Callable[[Meeting], bool], side: Side | None = None) -> Steps:
        """Run one batch, stopping before each operator with a product that `pause` names: what is about to meet in it.

        What the model holds is read when it is used, so it may be changed in place meanwhile. Another operand that is sent
        takes the place of the one that was shown, until the next stop. `side`: as for `run`. Raises DataError as `run` does.
        """
        args, kwargs = inputs
        found = self.runnable(args, kwargs)
        self._require_within(found, args, kwargs)
        if side is not None:
            self._require_same(found)
        wanted, whole = {op: [m for m in met if pause(m)] for op, met in found.nodes.items()}, self.graph.widths.at({})
        nodes = frozenset(n for n in found.script.nodes if wanted.get(n.name))
        reference = Reference(found.script, found.program, [side or Side(whole, whole)])
        running = reference.steps(lambda name: self._fetch(found, name), args, kwargs, nodes)
        env, before = reference.sides[0].env, dict[Node, Any]()
        for node in _without_gradients(running):
            env.update({source: made for source, made in before.items() if source in env})
            products = _products(node, wanted[node.name], found)
            before = yield from _exchanging(node, reference.sides[0], products)

    def _fetch(self, found: Runnable, name: str) -> torch.Tensor:
        constants = found.exported.constants
        return constants[name] if name in constants and name not in self._names else self.tensors(name)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.graph.held())

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Runnable:
        model, traced = self.graph.model, self.graph.capture
        by_value = isinstance(traced.exported, DirectProgram) and decisions_of(traced.exported) is not None
        try:
            with quiet(model), at_rest(model), torch.no_grad(), dumps_dropped():
                exported, _ = (record_decided if by_value else record)(model, args, dict(kwargs))
                mixed = not by_value and may_be_unfit(model, exported.graph)
                reason = unfit(model, args, kwargs, "a batch") if mixed else ""
        except Exception as error:
            raise unfit_batch(model, error) from error
        if reason:
            raise DataError(reason)
        if _alike(exported, traced):
            return Runnable(exported, traced.program, True)
        return Runnable(exported, lower(exported, False, held_by(model)), False)

    def _require_within(self, found: Runnable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise DataError when integers of an input that are looked up in a table lie outside of it."""
        for name, leaf in zip(found.inputs, pytree.tree_leaves((args, dict(kwargs))), strict=False):
            table = found.tables.get(name)
            if table is None or not isinstance(leaf, torch.Tensor) or leaf.is_floating_point() or not leaf.numel():
                continue
            (first, size), largest, least = table, int(leaf.max()), int(leaf.min())
            if largest >= size or least < first:
                raise DataError(
                    f"input {name!r} of a batch holds the index {largest if largest >= size else least}, but the table that it "
                    f"points into has {size} rows: look for a tokenizer that isn't the model's"
                )


class _Product(NamedTuple):
    """A product of an operator: the nodes of what meets in it, and what their dims come from."""

    meeting: Meeting
    operand: Node
    other: Node
    same: bool
    operand_from: tuple[Factors, ...]
    other_from: tuple[Factors, ...]


@dataclass(frozen=True)
class _Shower:
    """Shows what the products of an operator multiply to a watcher, and values to those who asked for them.

    A watcher is asked once for each of the products that its `wants`, if it has that, takes.
    """

    found: Runnable
    watcher: Watcher | None
    seen: Seen

    @cached_property
    def products(self) -> dict[Node, list[_Product]]:
        """The products to show, by their operators."""
        if self.watcher is None:
            return {}
        wants = getattr(self.watcher, "wants", lambda meeting: True)
        wanted = {op: [m for m in products if wants(m)] for op, products in self.found.nodes.items()}
        nodes = (node for node in self.found.script.nodes if wanted.get(node.name))
        return {node: _products(node, wanted[node.name], self.found) for node in nodes}

    @cached_property
    def watch(self) -> Watch:
        """The nodes that there is something to show of, and what does."""
        nodes = (n for n in self.found.script.nodes if n in self.products or n.name in self.seen)
        return dict.fromkeys(nodes, self.show)

    @cached_property
    def behind(self) -> frozenset[Node]:
        """What must have run before all is shown: what is seen, and what meets in the products."""
        needed = ([node] if node.name in self.seen else node.all_input_nodes for node in self.watch)
        return self.found.behind(frozenset(node for nodes in needed for node in nodes), frozenset(self.watch))

    def show(self, node: Node, side: SideRun) -> None:
        """What a node has made, and what it has met."""
        if node.name in self.seen:
            self.seen[node.name](side.cut(node).detach())
        if self.watcher is not None:
            for met in _met(node, side, self.products.get(node, ())):
                self.watcher(met)


def _products(node: Node, meetings: Iterable[Meeting], found: Runnable) -> list[_Product]:
    """Those products of a node of which both operands are among its own."""
    values, origins = found.program.values, found.origins
    made = {values[n.name].name: n for n in node.all_input_nodes if n.name in values}
    return [
        _Product(m, made[m.operand], made[m.other], found.same, origins.of(m.operand), origins.of(m.other))
        for m in meetings
        if m.operand in made and m.other in made
    ]


def _met(node: Node, side: SideRun, products: Iterable[_Product]) -> Iterator[Met]:
    """What meets in the products of a node, as far as it is no integers."""
    for meeting, source, beside, same, *places in products:
        operand, other = side.cut(source), side.cut(beside)
        if operand.is_floating_point() or operand.is_complex():
            yield Met(meeting, operand.detach(), other.detach(), node, same, *places)


def _without_gradients(running: Iterator[Node]) -> Iterator[Node]:
    """What a run stops at; gradients are off while it runs, and as they were while it stands, as others may run meanwhile."""
    while True:
        with torch.no_grad():
            node = next(running, None)
        if node is None:
            return
        yield node


def _exchanging(
    node: Node, side: SideRun, products: Sequence[_Product]
) -> Generator[Met, torch.Tensor | None, dict[Node, Any]]:
    """As `_met`, letting operands that are sent take the place of those shown; returns what was in these places before."""
    before: dict[Node, Any] = {}
    sources = {product.meeting: product.operand for product in products}
    for met in _met(node, side, products):
        instead = yield met
        if instead is not None:
            source = sources[met.meeting]
            before.setdefault(source, side.env[source])
            side.env[source] = instead
    return before


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
    """What a capture depends on: the structure of the inputs, the shapes and dtypes of tensors, all other leaves."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    found = [(tuple(x.shape), x.dtype, x.device.type) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
    return (str(spec), *found)


def _alike(exported: CapturedProgram, traced: Capture) -> bool:
    """Has a capture the operators of the graph's own, under the same names and given the same?"""
    mine, own = list(exported.graph.nodes), list(traced.exported.graph.nodes)
    return len(mine) == len(own) and all(
        a.name == b.name
        and a.target == b.target
        and [n.name for n in a.all_input_nodes] == [n.name for n in b.all_input_nodes]
        and _rank(a) == _rank(b)
        for a, b in zip(mine, own, strict=True)
    )


def _rank(node: Node) -> int | None:
    made = node.meta.get("val")
    return made.ndim if isinstance(made, torch.Tensor) else None
