"""Capture a model and remember where every size in its graph came from.

`record` captures a model while `SizeInt`s stand in for the integers that its modules hold (`attributes.py`) and a
function mode watches every torch call (`watching.py`). The result is the ordinary captured program, and for each
integer in its graph the expression over attributes and shapes that made it. `replay` runs the same forward outside of
torch.export and gives the calls alone, so that a changed model can be compared with its record call by call.

Nodes inside a submodule of the exported program (`wrap_with_set_grad_enabled` and other higher-order operators) are
named with the submodule's path, `submod_1.arange`; capture under `torch.no_grad()` to have the grad-mode ones inlined.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.fx
from torch import nn
from torch.fx.node import map_aggregate

from depgraph.capture.attributes import assign, current, mark
from depgraph.capture.control_flow import by_operators
from depgraph.capture.data import data_by_operators
from depgraph.capture.decided import capture_decided
from depgraph.capture.deciding import Decisions
from depgraph.capture.direct import capture_directly
from depgraph.capture.exported import CapturedProgram, DirectProgram
from depgraph.capture.expressions import renamed
from depgraph.capture.inlining import inlined
from depgraph.capture.keeping import unwritten
from depgraph.capture.leaving import fill_what_is_left
from depgraph.capture.matching import EXPRESSION, IMPLICIT, UNKNOWN, Path, Source, slots
from depgraph.capture.restoring import restored
from depgraph.capture.sizes import Expr, plain
from depgraph.capture.traced import Replaced
from depgraph.capture.watching import Call, Log, watched
from depgraph.errors import OpaqueValue

__all__ = [
    "Call",
    "Comparison",
    "FloatLeak",
    "Recording",
    "Site",
    "assign",
    "current",
    "record",
    "record_decided",
    "record_exported",
    "replay",
]

_TAG = "depgraph_name"
_Program = TypeVar("_Program", bound=CapturedProgram)


@dataclass(frozen=True, slots=True)
class Site:
    """A number in the arguments of a graph node.

    `path` leads to it: `("args", 1, 3)`, `("kwargs", "scale")`. `expr` is None where no expression is known; `origin`
    says why: "literal" (the call was given a plain integer), "implicit" (torch filled it in: a default, a dim that
    indexing chose), "shapes" (the call was given no number, so torch has it from its tensors) or "unknown" (no integer of
    the call fits, or several with different expressions do). Floats are listed only with an expression. `where` is the
    line of the call.
    """

    node: str
    path: Path
    value: int | float
    expr: Expr | None
    where: str
    origin: str = UNKNOWN


@dataclass(frozen=True, slots=True)
class Comparison:
    """`left == right` or `left != right` was asked during the forward; `equal` is whether they were equal."""

    left: Expr
    right: Expr
    equal: bool
    where: str


@dataclass(frozen=True, slots=True)
class Order:
    """`left < right`, or another order by its name in `operator`, was asked during the forward of numbers that were equal."""

    name: str
    left: Expr
    right: Expr
    where: str

    @property
    def holds(self) -> bool:
        """What came out."""
        return self.name in ("le", "ge")


@dataclass(frozen=True, slots=True)
class FloatLeak:
    """A size became a float or a tensor: what is computed from it changes when the size does."""

    expr: Expr
    where: str


@dataclass(frozen=True)
class Recording:
    """All that a recorded forward revealed. `note` says why it is empty, where it is."""

    sites: tuple[Site, ...] = ()
    calls: tuple[Call, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    leaks: tuple[FloatLeak, ...] = ()
    orders: tuple[Order, ...] = ()
    note: str = ""


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[CapturedProgram, Recording]:
    """Capture `model`, which is in eval mode and under `torch.no_grad()`, and record where its sizes came from.

    It is captured directly where that is possible, which gives the graph of torch.export in a fraction of the time, else by
    torch.export. The model is restored exactly, whatever happens.

    Raises:
        OpaqueValue: an output holds something that can't be looked into.
        Exception: whatever `torch.export.export` raises for this model.
    """
    given = (*args, kwargs or {})
    try:
        program, recording = _recorded(model, given, lambda: capture_directly(model, args, kwargs or {}))
        fill_what_is_left(program, model, (args, kwargs or {}))
        return program, recording
    except OpaqueValue:
        raise
    except Replaced as error:
        exported, recording = record_exported(model, args, kwargs)
        exported.replaced = str(error)  # type: ignore[attr-defined]
        return exported, recording
    except Exception:  # torch.export takes it, or says what is wrong
        return record_exported(model, args, kwargs)


def record_decided(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, wanted: Decisions | None = None
) -> tuple[DirectProgram, Recording]:
    """As `record`, on the values of the example inputs, for a model whose control flow depends on values.

    The code is told that it is being exported; where it fails then, it runs as always. `wanted` says what decisions are.

    Raises:
        Exception: whatever keeps the model from being captured.
    """
    wanted = wanted or Decisions()
    given = (*args, kwargs or {})

    def recorded(decisions: Decisions) -> tuple[DirectProgram, Recording]:
        with unwritten(model, *given):
            return _recorded(model, given, lambda: capture_decided(model, args, kwargs or {}, decisions))

    try:
        return recorded(replace(wanted, made=[], asked=[]))
    except Exception:
        return recorded(replace(wanted, made=[], asked=[], exporting=False))


def record_exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any
) -> tuple[torch.export.ExportedProgram, Recording]:
    """As `record`, through torch.export (non-strict, with further options of its own).

    Where that fails with the recording and works without it, the recording is empty and its `note` says why.

    Raises:
        Exception: whatever `torch.export.export` raises for this model without the recording.
    """

    given = (*args, kwargs or {})

    def export() -> torch.export.ExportedProgram:
        with unwritten(model, *given):
            return inlined(torch.export.export(model, args, kwargs, strict=False, **options))

    try:
        return _recorded(model, given, export)
    except Exception as error:
        note = f"recorded capture failed with {type(error).__name__}: {error}"
    with data_by_operators(model), by_operators(model):
        return export(), Recording(note=note)


def _recorded(model: nn.Module, inputs: tuple[Any, ...], capture: Callable[[], _Program]) -> tuple[_Program, Recording]:
    log = Log()
    with restored(model, *inputs), watched(model, log, _tag_nodes), by_operators(model):
        mark(model)
        program = capture()
    return program, _recording(program, log)


def replay(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Any, list[Call]]:
    """Run `model` once without gradients, on whatever device it is, and list its torch calls as `record` does."""
    log = Log()
    with torch.no_grad(), watched(model, log, lambda tracer: None), by_operators(model):
        output = model(*args, **(kwargs or {}))
    return output, log.calls


def _tag_nodes(tracer: Any) -> None:
    """Write every node's name into its meta, which passes of torch.export keep while they copy and rename nodes."""
    if tracer is not None:
        for node in tracer.graph.nodes:
            node.meta[_TAG] = (node.name, node.target)


def _recording(program: CapturedProgram, log: Log) -> Recording:
    nodes = dict(_named_nodes(program.graph, program.graph_module))
    traced = _traced_names(nodes)
    for node in nodes.values():
        _make_plain(node)
    if not log.calls:
        return Recording(note="no torch call was seen in the model's forward")
    if not traced:
        return Recording(note="torch.export kept no node's tag, so recorded and exported nodes can't be matched")
    settle = _Settled({before: after for after, before in traced.items()})
    return Recording(
        sites=tuple(site for name, node in nodes.items() for site in _sites(name, node, traced.get(name), log, settle)),
        calls=tuple(settle.call(seen) for seen in log.calls),
        comparisons=tuple(
            Comparison(left, right, equal, place)
            for before_left, before_right, equal, place in log.comparisons
            if (left := settle.expr(before_left)) is not None and (right := settle.expr(before_right)) is not None
        ),
        orders=tuple(
            Order(name, left, right, place)
            for name, before_left, before_right, place in log.orders
            if (left := settle.expr(before_left)) is not None and (right := settle.expr(before_right)) is not None
        ),
        leaks=tuple(FloatLeak(expr, place) for e, place in log.leaks if (expr := settle.expr(e)) is not None),
    )


def _traced_names(nodes: dict[str, torch.fx.Node]) -> dict[str, str]:
    """The name during the capture of every final node. Of copies that share a tag, the one with the same target."""
    chosen: dict[str, tuple[bool, str]] = {}
    for name, node in nodes.items():
        if _TAG not in node.meta:
            continue
        traced, target = node.meta[_TAG]
        same = node.target == target
        if traced not in chosen or (same and not chosen[traced][0]):
            chosen[traced] = (same, name)
    for node in nodes.values():  # only now: nodes may share one meta
        node.meta.pop(_TAG, None)
    return {name: traced for traced, (_, name) in chosen.items()}


class _Settled:
    """Names during the capture put into final names; what dead code elimination took has none."""

    def __init__(self, final: dict[str, str]) -> None:
        self._final = final
        self._exprs: dict[Expr, Expr | None] = {}

    def expr(self, expr: Expr) -> Expr | None:
        if expr not in self._exprs:
            self._exprs[expr] = renamed(expr, self._final.get)
        return self._exprs[expr]

    def call(self, seen: Call) -> Call:
        nodes = tuple(self._final[name] for name in seen.nodes if name in self._final)
        outputs = tuple(None if name is None else self._final.get(name) for name in seen.outputs)
        return Call(seen.function, nodes, outputs, seen.shapes, seen.where)


def _sites(name: str, node: torch.fx.Node, traced: str | None, log: Log, settle: _Settled) -> Iterator[Site]:
    if node.op != "call_function" or node.target is operator.getitem:
        return
    known = log.sources.get(traced or "", {})
    place = log.places.get(traced or "", "")
    for slot in slots(node):
        source = known.get(slot.path) or _symbolic_source(node, slot.value, log)
        expr = None if source.expr is None else settle.expr(source.expr)
        if source.expr is not None and expr is None:
            source = Source(None, UNKNOWN)
        if expr is not None or type(slot.value) is int:
            yield Site(name, slot.path, slot.value, expr, place, source.origin)


def _symbolic_source(node: torch.fx.Node, value: int | float, log: Log) -> Source:
    """The source of a number in a node that computes with symbolic sizes, or one that no call explains."""
    if isinstance(node.target, torch._ops.OpOverload):
        return Source(None, IMPLICIT if node.target is torch.ops.aten.sym_size.int else UNKNOWN)
    exprs = log.symbolics.get((getattr(node.target, "__name__", ""), int(value)), set())
    return Source(next(iter(exprs)), EXPRESSION) if len(exprs) == 1 else Source(None, UNKNOWN)


def _named_nodes(
    graph: torch.fx.Graph, module: torch.fx.GraphModule, prefix: str = ""
) -> Iterator[tuple[str, torch.fx.Node]]:
    for node in graph.nodes:
        yield prefix + node.name, node
    for name, inner in module.named_children():
        if isinstance(inner, torch.fx.GraphModule):
            yield from _named_nodes(inner.graph, inner, f"{prefix}{name}.")


def _make_plain(node: torch.fx.Node) -> None:
    """Ordinary numbers in the place of any `SizeInt` that an operator written in Python passed on into the graph."""
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), lambda value: found.append(value) if plain(value) is not value else None)
    if found:
        node.args = map_aggregate(node.args, plain)
        node.kwargs = map_aggregate(node.kwargs, plain)
