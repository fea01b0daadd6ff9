"""`trace` and what it gives: the dependency graph of a model, its axes, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depgraph.axes import Axis, build_axes
from depgraph.capture.capturing import Capture, capture
from depgraph.capture.deciding import at_places
from depgraph.capture.exported import decisions_of, only_as_module
from depgraph.capture.forgetting import forget
from depgraph.capture.holding import tensor_named, tensors_of
from depgraph.classes import Classes
from depgraph.errors import CaptureError, DepgraphError, PlanError
from depgraph.experts import with_experts
from depgraph.finite import require_finite
from depgraph.garbage import uncollected
from depgraph.modules import Modules
from depgraph.offloading import Weights, at_rest, offloaded
from depgraph.otherwise import with_other_ways
from depgraph.widths import Cost, Removal, Widths

if TYPE_CHECKING:
    import networkx as nx

    from depgraph.blocks import Block, Blocks
    from depgraph.cutting.bypassing import LeftOut
    from depgraph.cutting.expressing import SizeRules
    from depgraph.cutting.report import CutReport
    from depgraph.observing import Observer
    from depgraph.plan import Plan
    from depgraph.residual import Branch, Branches
    from depgraph.scoring import Depth, Scorer, Scores
    from depgraph.target import Target
    from depgraph.vocabulary import Vocabulary, Words


def trace(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    free: Iterable[str] = (),
    fixed: Iterable[str] = (),
) -> DependencyGraph:
    """Capture a model on example inputs and find what is coupled to what; weights are never touched.

    Args:
        model: any module; it may live on the meta device.
        args: positional example inputs (a tuple, or a single tensor).
        kwargs: keyword example inputs.
        strict: raise UnsupportedOperator for an operator without a rule, instead of leaving its dims alone.
        free: customs to lift, by name: ``"output 0"`` lets the width of the model's first output change.
        fixed: by-products to leave as they are, by name. An output that another output is computed from (hidden states
            beside logits) may become narrower, which the report of a cut notes, unless it is named here.

    Raises:
        CaptureError: `model` is no module, the inputs don't fit it, or its control flow depends on data.
        UnsupportedParameter: a parameter is quantised, sparse or distributed.
        PlanError: `free` or `fixed` names no output.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"trace takes a torch.nn.Module, not a {type(model).__name__}: give a module with a forward")
    args = args if isinstance(args, tuple) else tuple(args) if isinstance(args, list) else (args,)
    free, fixed = tuple(free), tuple(fixed)
    with uncollected(), at_rest(model):
        forget(model, args, dict(kwargs or {}))
        captured = with_other_ways(capture(model, args, kwargs or {}, strict), model, (args, kwargs or {}))
        for name in (*free, *fixed):
            if name not in captured.program.outputs:
                raise PlanError(f"the model has no {name}; it has {', '.join(captured.program.outputs)}")
        lifted = (frozenset(free) | captured.program.by_products) - frozenset(fixed)
        return DependencyGraph(model, args, dict(kwargs or {}), captured, lifted)


class DependencyGraph:
    """What is coupled to what in one model: `axes`, their groups, and exact costs."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Capture, free: frozenset[str]
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.capture = captured
        self.free = free
        self.words: Words | None = None
        self._left_out: dict[tuple[str, ...], LeftOut] = {}
        self.captures: dict[Any, Any] = {}  # those that observers made, by the shapes of inputs
        self.classes = Classes.of(captured.program, free)
        self.axes: list[Axis] = build_axes(captured.program, self.classes)
        self.widths = Widths(captured.program, self.classes, self.axes)
        self.axes = with_experts(self) if isinstance(model, nn.Module) else self.axes
        self.widths = Widths(captured.program, self.classes, self.axes)

    @property
    def name(self) -> str:
        """What to call the model in a sentence."""
        return type(self.model).__name__

    @property
    def form(self) -> str:
        """The only form that the model can be cut in, "module" or "graph"; "auto" where both may do."""
        whole = any(axis.tried for axis in self.axes)
        return "module" if whole or only_as_module(self.capture.exported) else "auto"

    @property
    def nodes(self) -> list[Any]:
        """The operators of the captured graph in order, as `depgraph.layers` reads them."""
        return list(self.capture.exported.graph.nodes)

    def parameter_ranks(self) -> dict[str, int]:
        """How many dims each parameter has, under all of its names."""
        return {name: p.dim() for name, p in self.model.named_parameters(remove_duplicate=False)}

    def has_parts(self, module: str) -> bool:
        """Does a module, by its path, hold others?"""
        return any(True for _ in self.model.get_submodule(module).children())

    def entries_of(self, container: str) -> int:
        """How many entries a container, by its path, holds."""
        return sum(path.rpartition(".")[0] == container for path in self.entries)

    @cached_property
    def _tree(self) -> Modules:
        return Modules(self.model, self.nodes)

    @property
    def entries(self) -> tuple[str, ...]:
        """Paths of entries of containers; see `modules.Modules`."""
        return self._tree.entries

    def likeness(self, path: str) -> tuple[object, ...]:
        """What a module is like; see `modules.Modules`."""
        return self._tree.likeness(path)

    def owner_of(self, target: str) -> str:
        """The path of the module that holds a parameter or buffer."""
        return target.rpartition(".")[0]

    def require_finite(self, error: type[DepgraphError]) -> None:
        """Raise `error` for the first weight that is NaN or infinite."""
        require_finite(self.model, error)

    def cut(self, plan: Plan, options: Mapping[str, Any]) -> CutReport:
        """Apply a plan of this graph; see `depgraph.plan.Plan.apply`."""
        from depgraph.cutting.applying import apply

        with at_rest(self.model), torch.inference_mode(False):
            return apply(plan, **options)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The model's only vocabulary; raises PlanError when there is none, or several, see `vocabularies`."""
        from depgraph.vocabulary import only_one

        return only_one(self.vocabularies)

    @cached_property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """Every table that integer inputs point into, by the name of the (first) input."""
        from depgraph.vocabulary import find_vocabularies

        return find_vocabularies(self)

    def opened(self, words: Words, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> DependencyGraph:
        """The same model with the axis of a vocabulary free, on other example inputs."""
        program = self.capture.program
        relations = replace(program.relations, parent=list(program.relations.parent))
        for dim in words.logits:
            relations.align(words.dim, dim)
        captured = replace(self.capture, program=replace(program, relations=relations))
        graph = DependencyGraph(self.model, *inputs, captured, self.free | words.lifts)
        graph.words = words
        return graph

    def __getitem__(self, name: str) -> Axis:
        """The axis of that name; raises KeyError."""
        return self.widths.axes[name]

    @property
    def unknown(self) -> dict[str, list[str]]:
        """Operators without a rule, and the places in the code where they stand."""
        return self.capture.program.unknown

    @property
    def note(self) -> str:
        """What to know of how the model was captured: a sentence, empty where there is nothing to say."""
        decisions = decisions_of(self.capture.exported)
        if decisions is None:
            return ""
        if not decisions.made:
            return "captured on the values of the example, as torch can't capture it without"
        checked = (
            "none of these depends on an input or a weight"
            if decisions.settled
            else "a cut is checked for the way that the example takes"
        )
        return f"captured on the values of the example, as the code depends on values{at_places(decisions)}: {checked}"

    def observer(self) -> Observer:
        """What runs the model on batches and looks at what its operators are given."""
        from depgraph.observing import Observer

        return Observer(self)

    def again(self, model: Any) -> DependencyGraph:
        """The graph of another model that takes the same inputs, such as a cut one."""
        return trace(model, self.args, self.kwargs)

    def check_unchanged(self) -> None:
        """Raise PlanError when the model's tensors are no longer what they were when it was traced."""
        tensors = self.held()
        for value in self.capture.program.values.values():
            if value.kind in ("parameter", "buffer") and value.target:
                tensor = tensors.get(value.target)
                if tensor is None or tuple(tensor.shape) != value.shape:
                    now = "gone" if tensor is None else f"of shape {tuple(tensor.shape)}"
                    raise PlanError(
                        f"{type(self.model).__name__} has changed since it was traced: {value.target!r} was of shape "
                        f"{value.shape} and is {now}; trace it again"
                    )

    def cost(self, removal: Removal | None = None, branches: Iterable[str] = ()) -> Cost:
        """Exact cost of the model as it is, or after a removal (axis name -> group numbers), without some branches and blocks."""
        gone, kept = tuple(branches), self.widths.at(removal or {})
        if not gone:
            return kept.cost()
        left_out = self.left_out(gone)
        return kept.cost(left_out.parameters, left_out.nodes)

    @cached_property
    def residual(self) -> Branches:
        """The search for branches, with all that it found on its way."""
        from depgraph.residual import Branches

        return Branches(self)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What additions join with the stream that it was computed from, in order of execution; see `residual.Branch`."""
        return self.residual.found

    @cached_property
    def _blocks(self) -> Blocks:
        from depgraph.blocks import Blocks

        return Blocks(self.residual)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Entries of containers that can be left out whole, in order of execution; see `blocks.Block`."""
        return self._blocks.found

    @property
    def branches_refused(self) -> dict[str, str]:
        """Why what looks like a branch or a block can't go, by name: a sentence."""
        return {**self.residual.refused, **self._blocks.refused}

    @cached_property
    def sizes(self) -> SizeRules:
        """Where the sizes in the model's Python come from, and what they must become."""
        from depgraph.cutting.expressing import SizeRules

        return SizeRules(self)

    @cached_property
    def steps_first(self) -> frozenset[str]:
        """The names in the graph of the inputs that have steps along their first dim, samples along their second."""
        from depgraph.origins import steps_first

        return steps_first(self)

    @cached_property
    def dense_cost(self) -> Cost:
        return self.cost()

    def plan(self, scorer: Scorer | Scores | Depth, target: Target, **options: Any) -> Plan:
        """Choose which groups go, and which branches and blocks; see `depgraph.options.Options` for the options."""
        from depgraph.mixing import plan_of

        with uncollected():
            return plan_of(self, scorer, target, options)

    def cut_plan(self, removal: Removal | None = None, branches: Iterable[str] = ()) -> Plan:
        """A plan that removes just the given groups (axis name -> group numbers), and the named branches and blocks."""
        from depgraph.plan import Plan

        return Plan.of(self, removal or {}, branches=branches)

    def left_out(self, names: Iterable[str]) -> LeftOut:
        """The nodes and the parameters and buffers that go when branches and blocks of these names are left out."""
        from depgraph.cutting.bypassing import left_out

        key = tuple(sorted(names))
        if key not in self._left_out:
            self._left_out[key] = left_out(self, key)
        return self._left_out[key]

    def show(self) -> str:
        """The axes as text a person can read: name, groups, exact or not, members, and what is fixed."""
        from depgraph.report import axes_text

        return axes_text(self)

    def html(self) -> str:
        """The model as a page to open in a browser: widths as bars, axes highlighted, what is fixed and why."""
        from depgraph.inspecting import Inspection
        from depgraph.page import html_page

        return html_page(Inspection(self))

    def to_networkx(self) -> nx.Graph:
        """A bipartite graph of axes and the parameter dims they reach; write it with networkx for Graphviz."""
        from depgraph.networks import network_of

        return network_of(self)

    def to_dot(self) -> str:
        """The same as Graphviz source."""
        from depgraph.networks import dot_of

        return dot_of(self)

    def held(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers that the model's modules hold by name, tied ones under every name."""
        return tensors_of(self.model)

    @property
    def on_meta(self) -> bool:
        """Is there a tensor without numbers, here or elsewhere?"""
        away = offloaded(self.model)
        return any(t.is_meta and name not in away for name, t in self.held().items())

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The same; what accelerate has offloaded is read where it lies, each time that it is asked for."""
        away = offloaded(self.model)
        return Weights(self.held(), away) if away else self.held()

    def tensor(self, name: str) -> torch.Tensor:
        """One of `tensors`, without looking for all of them."""
        held = tensor_named(self.model, name)
        return self.tensors()[name] if held is None or held.is_meta else held
