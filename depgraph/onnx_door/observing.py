"""Running a traced file on other inputs in ONNX Runtime, and looking at what its operators are given.

What is looked at becomes an output of a copy of the file, from bodies of `If`, `Loop` and `Scan` too. All that one batch makes is
held at a time; a file too large for that is run piece by piece, and what a piece made is shown before the next one runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from depgraph.consumers import Meeting, meetings
from depgraph.cutting.sides import Side
from depgraph.errors import CaptureError, DataError
from depgraph.graph import Program, Value
from depgraph.observing import Met, Seen, Steps, Watcher
from depgraph.onnx_door.arrays import as_torch
from depgraph.onnx_door.copies import Cut
from depgraph.onnx_door.evaluating import bodies
from depgraph.onnx_door.examples import Arrays, given_inputs, runtime_inputs, tables
from depgraph.onnx_door.exposing import Exposed, expose
from depgraph.onnx_door.pieces import Pieces
from depgraph.onnx_door.running import RunError, Running, is_large
from depgraph.onnx_door.zeroing import zeroed

if TYPE_CHECKING:
    from depgraph.onnx_door.graph import OnnxGraph

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Outputs = list[tuple[Value, torch.Tensor]]


@dataclass(frozen=True)
class FileRunnable:
    """The program of a file, which fits inputs of any shape that the file takes."""

    graph: OnnxGraph

    @property
    def program(self) -> Program:
        return self.graph.capture.program

    @cached_property
    def meetings(self) -> list[Meeting]:
        """Its products, see `depgraph.consumers.meetings`."""
        return meetings(self.program, self.graph.nodes)

    @cached_property
    def inputs(self) -> list[str]:
        """The names of the inputs that must be given, in their order."""
        return [str(value.name) for value in runtime_inputs(self.graph.model)]

    @cached_property
    def tables(self) -> dict[str, int]:
        """The sizes of the tables that inputs point into, by the names of these."""
        return tables(self.graph.model)


class FileObserver:
    """Runs the file of a graph on batches: what `depgraph.observing.Observer` is for a module.

    A changed copy of the file is run in its place if one is given.
    """

    def __init__(self, graph: OnnxGraph, instead: Cut | None = None) -> None:
        self.graph = graph
        self.instead = instead
        self.lowered = graph.capture.lowered
        self.tensors = graph.tensors().__getitem__
        self._sessions: dict[tuple[str, ...], tuple[Running, Exposed]] = {}

    @cached_property
    def own(self) -> FileRunnable:
        """The program that the graph was made of."""
        return FileRunnable(self.graph)

    @cached_property
    def pausable(self) -> list[Meeting]:
        """The products that `steps` can stop before: not those inside the bodies of control flow."""
        outside = set(self.graph.model.graph)
        return [m for m in self.own.meetings if self.lowered.operators[m.op] in outside]

    def run(
        self, inputs: Inputs, watch: Watcher | None = None, seen: Seen | None = None, side: Side | None = None
    ) -> Outputs:
        """Run one batch and give every product with two operands to `watch`, and values to what `seen` has under their names.

        `side` says what is zeroed meanwhile. A `watch` with a method `wants` is given the products that this takes.

        Raises DataError where the file doesn't run on the batch.
        """
        wants = getattr(watch, "wants", lambda meeting: True)
        products = [m for m in self.own.meetings if wants(m)] if watch is not None else []
        show = _Show(self, products, watch, seen or {})
        given = self._given(inputs)
        if side is None and self.instead is None and is_large(self.graph.model):
            made = self._by_pieces(given, show)
        else:
            made = self._at_once(given, show, side)
        return [(value, as_torch(made[value.name])) for value in self.own.program.outputs.values()]

    def watch(
        self, inputs: Inputs, watch: Watcher | None = None, seen: Seen | None = None, side: Side | None = None
    ) -> None:
        """As `run`, for what is looked at alone."""
        self.run(inputs, watch, seen, side)

    def call(self, inputs: Inputs, side: Side | None = None, seen: Seen | None = None) -> Any:
        """What the file gives for one batch: a tensor, or several by name; `seen` as in `run`. Raises DataError as that does."""
        made = {str(self._files[v.name].name): t for v, t in self.run(inputs, seen=seen, side=side)}
        return next(iter(made.values())) if len(made) == 1 else made

    def steps(self, inputs: Inputs, pause: Callable[[Meeting], bool]) -> Steps:
        """Run one batch, stopping before each operator with a product that `pause` names: what is about to meet in it.

        What the file holds is read when it is used, so it may be changed meanwhile. Another operand that is sent takes the
        place of the one that was shown, until the next stop. Raises DataError as `run` does.
        """
        given, wanted = self._given(inputs), defaultdict[ir.Node, list[Meeting]](list)
        for meeting in filter(pause, self.pausable):
            wanted[self.lowered.operators[meeting.op]].append(meeting)
        show = _Show(self, [m for met in wanted.values() for m in met], None, {})
        pieces = Pieces(self.graph.model, frozenset(wanted))
        before: Arrays = {}
        try:
            for stage in pieces.stages(given, frozenset()):
                first = next((node for node in stage.piece if node in wanted), None)
                if stage.done:
                    stage.values.update(before)
                    before = {}
                elif first is not None:
                    arrays = self._named(stage.values, show.names)
                    others = {m.other for m in wanted[first]} - arrays.keys()
                    late = {name: pieces.stored(str(self._files[name].name)) for name in others if name in self._files}
                    arrays |= {name: array for name, array in late.items() if array is not None}
                    yield from self._met(
                        (met for m in wanted[first] for met in show.met(m, arrays)), stage.values, before
                    )
        except RunError as error:
            raise DataError(f"a batch doesn't fit {self.graph.name}: {error}") from error

    def _met(self, shown: Iterable[Met], values: Arrays, before: Arrays) -> Steps:
        """Show what meets; operands that are sent take the place of those in `values`, which `before` keeps."""
        for met in shown:
            instead = yield met
            if instead is not None:
                at = str(self._files[met.meeting.operand].name)
                before.setdefault(at, values[at])
                values[at] = instead.numpy().astype(before[at].dtype)

    def _given(self, inputs: Inputs) -> Arrays:
        """A batch as arrays by name."""
        args, kwargs = inputs
        try:
            found = given_inputs(self.graph.model, args[0] if len(args) == 1 else args, kwargs)
        except CaptureError as error:
            raise DataError(f"a batch doesn't fit {self.graph.name}: {error}") from error
        if found is None and self.own.inputs:
            raise DataError(
                f"a batch doesn't fit {self.graph.name}: it has none of the inputs {', '.join(self.own.inputs)}"
            )
        return found or {}

    def _at_once(self, given: Arrays, show: _Show, side: Side | None) -> Arrays:
        """All that is looked at, from one call of the runtime."""
        names = [*show.names, *(v.name for v in self.own.program.outputs.values())]
        try:
            running, exposed = self._session(tuple(dict.fromkeys(names)), side)
            asked = dict.fromkeys(name for name in exposed.names.values() if name not in given)
            found = given | dict(zip(asked, running(given, list(asked)), strict=True))
        except RunError as error:
            raise DataError(f"a batch doesn't fit {self.graph.name}: {error}") from error
        made = {name: found[at] for name, at in exposed.names.items()}
        show.all(made, exposed.stacked)
        return made

    def _session(self, names: tuple[str, ...], side: Side | None) -> tuple[Running, Exposed]:
        if side is None and names in self._sessions:
            return self._sessions[names]
        made = self._model(side)
        values = {name: self._files[name] for name in names if name in self._files}
        exposed = expose(made, values, self.graph.capture.evaluated)
        found = Running(exposed.model), exposed
        if side is None:
            self._sessions = {names: found}
        return found

    def _model(self, side: Side | None) -> Cut:
        """A copy of what is run."""
        if side is not None:
            return zeroed(self.graph, side)
        if self.instead is None:
            return Cut.copy(self.graph.model)
        copy = Cut.copy(self.instead.model)
        return Cut(
            copy.model,
            values={new: self.instead.values[old] for new, old in copy.values.items() if old in self.instead.values},
        )

    def _by_pieces(self, given: Arrays, show: _Show) -> Arrays:
        """What a file gives that is run piece by piece; what is looked at is shown on the way."""
        outputs = {v.name: str(self._files[v.name].name) for v in self.own.program.outputs.values()}
        looked_at = frozenset(str(self._files[n].name) for n in show.names if n in self._files)
        values: Arrays = given
        try:
            for stage in Pieces(self.graph.model).stages(given, looked_at, frozenset(outputs.values())):
                values = stage.values
                if stage.done:
                    show.piece(stage.piece, self._named(values, show.names))
        except RunError as error:
            raise DataError(f"a batch doesn't fit {self.graph.name}: {error}") from error
        return {name: values[at] for name, at in outputs.items()}

    def _named(self, values: Arrays, names: Iterable[str]) -> Arrays:
        """Values by the names that the program has for them."""
        found = {name: str(self._files[name].name) for name in names if name in self._files}
        return {name: values[at] for name, at in found.items() if at in values}

    @cached_property
    def _files(self) -> dict[str, ir.Value]:
        """The file's value for each of the program's."""
        return {value.name: at for at, value in self.lowered.values.items()}

    @cached_property
    def steps_by_name(self) -> dict[str, Any]:
        """The graph's steps."""
        return {step.name: step for step in self.graph.nodes}


_NOTHING = np.zeros(0)


class _Show:
    """Shows what meets to a watcher, and values to those who asked for them; `names` are all that it needs."""

    def __init__(self, observer: FileObserver, products: list[Meeting], watch: Watcher | None, seen: Seen) -> None:
        self.observer, self.products, self.watch, self.seen = observer, products, watch, seen
        held = observer.lowered.held
        operands = (name for m in products for name in (m.operand, m.other))
        outside = {m.op for m in observer.pausable}
        self.inner = frozenset(m.op for m in products if m.op not in outside)
        self.names = tuple(dict.fromkeys(name for name in (*operands, *self.inner, *seen) if name not in held))

    @cached_property
    def _places(self) -> dict[ir.Node, list[tuple[list[Meeting], list[str]]]]:
        """What there is to show of each operator of the main graph and of the bodies that it has: products, values."""
        operators = self.observer.lowered.operators
        products: dict[ir.Node, list[Meeting]] = defaultdict(list)
        for meeting in self.products:
            products[operators[meeting.op]].append(meeting)
        values = {self.observer._files[name]: name for name in self.seen if name in self.observer._files}
        found: dict[ir.Node, list[tuple[list[Meeting], list[str]]]] = {}
        for node in self.observer.graph.model.graph:
            inner = [node, *_within(node)]
            found[node] = [
                (products.get(n, []), [values[v] for v in n.outputs if v in values])
                for n in inner
                if n in products or any(v in values for v in n.outputs)
            ]
        return found

    def all(self, made: Arrays, stacked: set[str]) -> None:
        """Show everything, in the order of execution."""
        for name in self.seen:
            if name in made and name in self.observer.graph.inputs:
                self.seen[name](as_torch(made[name]))
        self.piece(self.observer.graph.model.graph, made, stacked)

    def piece(self, nodes: Iterable[ir.Node], made: Arrays, stacked: set[str] | frozenset[str] = frozenset()) -> None:
        """Show what some operators have met and made."""
        for products, values in (place for node in nodes for place in self._places.get(node, ())):
            for name in values:
                if name in made:
                    self.seen[name](as_torch(made[name]))
            if self.watch is not None:
                for met in (met for meeting in products for met in self.met(meeting, made, stacked)):
                    self.watch(met)

    def met(self, meeting: Meeting, made: Arrays, stacked: set[str] | frozenset[str] = frozenset()) -> Iterator[Met]:
        """What comes together in a product, round by round; nothing where it isn't known, is empty or holds integers.

        What a product in a branch made is looked at too: it is empty where the branch wasn't taken.
        """
        if meeting.op in self.inner and not made.get(meeting.op, _NOTHING).size:
            return
        operand, other = (self._array(name, made) for name in (meeting.operand, meeting.other))
        if operand is None or other is None or operand.dtype.kind != "f" or not operand.size or not other.size:
            return
        step = self.observer.steps_by_name[meeting.op]
        both = [(a, name in stacked) for a, name in ((operand, meeting.operand), (other, meeting.other))]
        rounds = max((len(a) for a, rolled in both if rolled), default=1)
        for k in range(rounds):
            first, second = (as_torch(a[k] if rolled else a) for a, rolled in both)
            yield Met(meeting, first, second, step)

    def _array(self, name: str, made: Arrays) -> np.ndarray | None:
        return self.observer.graph.array(name) if name in self.observer.lowered.held else made.get(name)


def _within(node: ir.Node) -> Iterator[ir.Node]:
    """The operators in the bodies of one."""
    for body in bodies(node):
        for inner in body:
            yield inner
            yield from _within(inner)
