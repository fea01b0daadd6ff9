"""The steps of a schedule as they are carried out: from each model to the next, and what they left of the first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

import depgraph
from depgraph import Axis, Cost, DependencyGraph, Plan, Target
from depgraph.budget import LATENCY
from depgraph.cutting.report import Check, CutReport
from depgraph.cutting.rerunning import Inputs, inputs_at
from depgraph.errors import DepgraphError, NothingToPrune, PlanError, TargetError
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.options import Options
from depgraph.patterns import Matcher, Pattern
from depgraph.scoring import Scorer
from depgraph.target import METRICS
from depgraph.unmet import in_words_of
from importance.earlier import followed
from importance.lineage import Later, Lineage

_ALL_BUT = math.nextafter(1.0, 0.0)
_CLEARLY = 0.01  # of the dense cost: what is nearer may be within reach of several steps


@dataclass(frozen=True)
class Step:
    """One step that is done: which of how many, and what the model costs now.

    `keep` has the share of the dense cost (under "latency", of its milliseconds) that the step was to keep, by measure. `check` is
    None where nothing was cut, as the step before had met that already, or no check was wanted. `latency` is the share of the
    dense milliseconds that is left, None where these aren't limited.
    """

    number: int
    steps: int
    keep: dict[str, float]
    cost: Cost
    check: Check | None = None
    notes: tuple[str, ...] = ()
    latency: float | None = None

    def left(self, before: Cost) -> dict[str, float]:
        """What is left of a dense cost, by measure."""
        timed = {} if self.latency is None else {LATENCY: self.latency}
        return self.cost.share_of(before) | timed

    def __str__(self) -> str:
        return f"step {self.number} of {self.steps}"


@dataclass(frozen=True)
class _Cut:
    """What the next step has to know of a cut, without the model before it: groups left, and how to trace the model again."""

    left: dict[str, int]
    inputs: Inputs
    free: frozenset[str]
    fixed: frozenset[str]
    params: int

    @classmethod
    def of(cls, plan: Plan, added: int) -> _Cut:
        """After a cut that so many parameters were added to."""
        graph = plan.graph
        left = {axis.name: axis.size - len(plan.removal.get(axis.name, ())) for axis in graph.axes}
        fixed = frozenset(graph.capture.program.by_products) - graph.free
        return cls(left, _inputs(plan), graph.free, fixed, plan.cost().params + added)

    def again(self, model: nn.Module) -> DependencyGraph:
        """The graph of the cut model, with the same outputs free.

        Raises PlanError where what was called after a step has changed shapes.
        """
        graph = depgraph.trace(model, *self.inputs, free=self.free, fixed=self.fixed)
        if graph.dense_cost.params != self.params:
            raise PlanError(
                f"the model has {graph.dense_cost.params:,} parameters, the step before left {self.params:,}: "
                "what is called after a step may change weights, not their shapes"
            )
        return graph


class Run:
    """The state between steps: the model as far as it is cut, and either its graph or the cut that it comes from."""

    def __init__(
        self,
        graph: DependencyGraph,
        scorer: Scorer,
        target: Target,
        options: dict[str, Any],
        after_cut: Callable[[Plan, CutReport], Any] | None,
    ) -> None:
        if not isinstance(target, Target):
            raise TargetError(f"expected a Target such as depgraph.Target(params=0.7), got {target!r}")
        if graph.words is not None:
            raise PlanError("a graph with an open vocabulary can't be pruned in steps: trim it before or after")
        self.dense = graph.dense_cost
        self.target, self.lineage = target, Lineage(graph)
        self.shares = shares_of(graph, target)
        self.latency: float | None = None if target.latency is None else 1.0
        self.state: DependencyGraph | _Cut = graph
        self.scorer = scorer
        self.after_cut = after_cut
        self.options = _Kept(graph, {name: value for name, value in options.items() if name != "check"})
        self.applying = {name: value for name, value in options.items() if name in ("form", "check")}
        self.model = graph.model
        self.steps: list[Step] = []

    def require_reachable(self) -> None:
        """Raise TargetError at once where the floors keep the target clearly out of reach, whatever the scores: steps take long."""
        graph = self._graph()
        try:
            graph.plan({axis.name: np.zeros(axis.size) for axis in graph.axes}, self.target, **self.options.on(graph))
        except DepgraphError as error:
            least = error.unmet.least if isinstance(error, TargetError) and error.unmet is not None else {}
            if any(self._share(measure, value) > self.shares[measure] + _CLEARLY for measure, value in least.items()):
                raise

    def _share(self, measure: str, value: float) -> float:
        """Of what the dense model takes."""
        if measure == LATENCY and self.target.latency is not None:
            return value / (self.target.latency.ms(self.lineage.first.widths.at({})) or 1.0)
        return value / max(getattr(self.dense, measure), 1)

    @contextmanager
    def named(self, number: int, steps: int) -> Iterator[None]:
        """Errors say in which step they came, and what the steps before had reached."""
        try:
            yield
        except DepgraphError as error:
            if steps == 1:
                with in_words_of(self.target, self.dense):
                    raise
            shares = self.steps[-1].left(self.dense) if self.steps else self.dense.share_of(self.dense)
            reached = ", ".join(f"{metric}={share:.3f}" for metric, share in shares.items())
            where = f"step {number} of {steps}, from a model with {reached}: "
            if isinstance(error, TargetError) and error.unmet is not None:  # of a share of what is left by now
                with in_words_of(self.target, self.dense, where):
                    raise
            kind = TargetError if self.steps and isinstance(error, NothingToPrune) else type(error)
            raise kind(f"{where}{error}") from error

    def step(self, wanted: Step) -> Step:
        """Cut the model to what a step keeps, where it isn't that small yet; the first step makes it a copy in any case."""
        graph = self._graph()
        target = self._remaining(wanted.keep, graph)
        done = replace(wanted, cost=graph.dense_cost, latency=self.latency)
        if target is not None or not self.steps:
            plan = graph.plan(self.scorer, target, **self.options.on(graph)) if target else graph.cut_plan({})
            report = plan.apply_with_report(**self.applying)
            before = _size(report.model)
            self._follow(plan)
            if self.after_cut is not None:
                self.after_cut(plan, report)
            self.model, self.state = report.model, _Cut.of(plan, _size(report.model) - before)
            said = {"check": report.check, "notes": (*plan.notes, *report.notes), "latency": self.latency}
            done = replace(wanted, cost=report.after, **said)  # type: ignore[arg-type]
        self.steps.append(done)
        return done

    def plan(self) -> Plan | None:
        """One plan of the first graph for all steps, where that can be told."""
        if isinstance(self.model, ir.Model):
            return None
        return self.lineage.plan({name: tuple(p.shape) for name, p in self.model.named_parameters()})

    def _follow(self, plan: Plan) -> None:
        """A plan is carried out: how fast what is left is, and which groups of the first graph went."""
        if self.target.latency is not None:
            now = Later(self.lineage, self.target.latency, plan.graph).ms(plan.kept())
            self.latency = now / (self.target.latency.ms(self.lineage.first.widths.at({})) or 1.0)
        self.lineage.cut(plan)

    def _remaining(self, keep: dict[str, float], graph: DependencyGraph) -> Target | None:
        """What is left to do on the current graph, of the shares of the dense model that a step keeps; None where nothing is."""
        found = _remaining(keep, self.dense, graph.dense_cost)
        if LATENCY in keep and self.target.latency is not None:
            latency = Later(self.lineage, self.target.latency, graph)
            most = keep[LATENCY] * self.target.latency.ms(self.lineage.first.widths.at({}))
            if latency.ms(graph.widths.at({})) > most:
                found |= {"latency_ms": most, "latency": latency}
        return Target(**found) if found else None

    def _graph(self) -> DependencyGraph:
        if isinstance(self.state, _Cut):
            graph = self.state.again(self.model)
            self.options.follow(self.state.left, graph)
            self.state = graph
        return self.state


class _Kept:
    """Options of a plan as they hold for later graphs: axes that were named stay so, floors are shares of the first widths."""

    def __init__(self, graph: DependencyGraph, given: dict[str, Any]) -> None:
        self.given = given
        self.options = Options.of(given)
        self.options.check_patterns(graph)
        self.first = {axis.name: axis for axis in graph.axes}
        self.now = {name: name for name in self.first}

    def follow(self, left: dict[str, int], graph: DependencyGraph) -> None:
        """From now on `graph` is the current one; of the axes of that before, the cut has left so many groups."""
        names = followed(left, graph.axes)
        self.now = {new: self.now[old] for new, old in names.items() if old in self.now}

    def on(self, graph: DependencyGraph) -> dict[str, Any]:
        """The options for the current graph."""
        named = {name: self._named(getattr(self.options, name)) for name in ("protect", "only") if name in self.given}
        stay = {new: self.options.floor_of(self.first[old]) * self.first[old].size for new, old in self.now.items()}
        return (
            self.given
            | named
            | {"floor": {n: min(groups / graph[n].size, 1.0) for n, groups in stay.items() if groups}}
        )

    def _named(self, patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
        asked = Matcher(patterns)

        def is_named(axis: Axis) -> bool:
            return asked(self.first.get(self.now.get(axis.name, ""), axis))

        return (is_named,) if patterns else ()


def _inputs(plan: Plan) -> Inputs:
    """The example inputs of the cut model, for `depgraph.trace`."""
    if isinstance(plan.graph, OnnxGraph):
        return (plan.graph.inputs_at(plan.kept()), {})  # type: ignore[return-value]
    return inputs_at(plan.graph, plan.kept())


def _size(model: Any) -> int:
    if isinstance(model, ir.Model):
        held = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
        return sum(math.prod(tensor.shape.numpy()) for tensor in held if tensor is not None)
    return sum(parameter.numel() for parameter in model.parameters())


def _remaining(keep: dict[str, float], dense: Cost, now: Cost) -> dict[str, Any]:
    """The shares of a model's cost now that meet shares of its dense cost, but for those that it meets."""
    shares: dict[str, Any] = {}
    for metric in METRICS:
        most, cost = keep.get(metric, 1.0) * getattr(dense, metric), getattr(now, metric)
        if cost > most and metric in keep:
            shares[metric] = keep[metric] if cost == getattr(dense, metric) else (math.floor(most) + 0.5) / cost
    return shares


def shares_of(graph: DependencyGraph, target: Target) -> dict[str, float]:
    """A target as shares of what the dense model costs, by measure, "latency" among them, but for those that it meets anyway."""
    found = dict[str, float]()
    if target.latency is not None and target.latency_ms is not None:
        dense = target.latency.ms(graph.widths.at({}))
        found[LATENCY] = target.latency_ms / dense if dense else math.inf
    found |= target.shares
    if target.most_bytes is not None:
        found["bytes"] = target.most_bytes / max(graph.dense_cost.bytes, 1)
    return {measure: share for measure, share in found.items() if share < 1} or dict.fromkeys(found, _ALL_BUT)
