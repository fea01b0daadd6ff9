"""Cutting in the graph: the captured program with narrowed parameters and recomputed sizes, as a torch.fx.GraphModule.

The fallback that always works: what a module's Python can't express, its program can. Sizes that nothing cuts stay
symbolic, so batch, sequence and picture remain dynamic where torch.export can capture them so.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from depgraph.axes import build_axes
from depgraph.capture.capturing import dumps_dropped, quiet
from depgraph.capture.control_flow import by_operators
from depgraph.capture.data import data_by_operators
from depgraph.capture.deciding import at_places
from depgraph.capture.exported import CapturedProgram, DirectProgram, decisions_of
from depgraph.capture.holding import held_by
from depgraph.capture.inlining import inlined
from depgraph.capture.keeping import unwritten
from depgraph.capture.keywords import keywords_named
from depgraph.capture.lowering import lower
from depgraph.capture.reserved_names import apart_in, module_apart
from depgraph.capture.training import related_in_training
from depgraph.capture.unlifting import module_of
from depgraph.classes import Classes
from depgraph.cutting.elsewhere import require_same_elsewhere, require_unseeded
from depgraph.cutting.graph_form import GraphForm
from depgraph.cutting.involved import none_involved
from depgraph.cutting.modes import follow_modes
from depgraph.cutting.module import new_tensor
from depgraph.cutting.mutating import write_back, write_without_gradients, written_targets
from depgraph.cutting.omitting import Alike, alike, omit
from depgraph.cutting.rewriting import Share, call_arguments, rewrite
from depgraph.cutting.varying import Dims, Taken, TakenInput, wrong_sizes
from depgraph.errors import CutError
from depgraph.graph import Program
from depgraph.widths import Kept, Widths

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan


@dataclass(frozen=True)
class Way:
    """A cut program, and what its capture says of the input tensors; None where that holds for the example's sizes only."""

    model: GraphModule
    inputs: Taken | None


@dataclass(frozen=True)
class _Captured:
    """A capture of the model, and the cut in its terms."""

    exported: CapturedProgram
    program: Program
    kept: Kept


Edit = Callable[[GraphModule, Alike], None]
"""What else is done to a program: it is told the nodes by the names of those of the traced graph."""


def cut_programs(plan: Plan, edit: Edit | None = None) -> Iterator[Way]:
    """The cut program in each way that it can be had, that for the most sizes of the inputs first.

    Raises CutError where there is none.
    """
    graph = plan.graph
    decisions = decisions_of(graph.capture.exported)
    if decisions is not None and not decisions.settled:
        raise CutError(
            f"{type(graph.model).__name__} has no graph form, as its code depends on values{at_places(decisions)}: use "
            "form='module', or plan with form='module'"
        )
    replaced = getattr(graph.capture.exported, "replaced", "")
    if replaced:
        raise CutError(
            f"{type(graph.model).__name__} has no graph form, as its forward replaces {replaced}, which a graph can't: "
            "use form='module', or plan with form='module'"
        )
    require_unseeded(graph)
    if decisions is not None:
        require_same_elsewhere(graph)
    inputs = graph.args, graph.kwargs
    found = False
    for given, dims in _attempts(inputs):
        way = _captured_again(plan, given, dims, edit)
        if way is not None:
            found = True
            yield way
    traced = graph.capture.exported
    if isinstance(traced, DirectProgram):
        captured = _Captured(traced, graph.capture.program, plan.kept())
        module = module_of(traced, graph.tensors(), inputs)
        yield Way(_of_one_size(_cut(plan, captured, module, _told(plan, module, edit), edit), inputs), None)
    elif not found:
        raise CutError(
            f"torch.export captures {type(graph.model).__name__} in another way than it was traced, so that its graph "
            "can't be cut by this plan: use form='module', or plan with form='module'"
        )


def _attempts(inputs: Any) -> Iterator[tuple[Any, Any]]:
    """What to capture with, and which dims to leave open: all, batch and sequence (where these are fewer), none."""
    two, tried = _two_of_each(inputs), []
    for open_dims in (_all_dims, _batch_and_sequence):
        dims = pytree.tree_map(open_dims, two)
        if dims not in tried:
            tried.append(dims)
            yield two, dims
    yield inputs, pytree.tree_map(lambda leaf: None, inputs)


def _captured_again(plan: Plan, given: Any, dims: Any, edit: Edit | None) -> Way | None:
    """The cut in torch.export's capture with these dims open; None where that fails, or sees the model otherwise."""
    exported = _exported(plan.graph, given, dims)
    taken = {} if exported is None else _taken(exported, given)
    if exported is not None and taken:
        wrong = wrong_sizes(plan.graph, module_apart(exported), taken)
        if wrong:
            return _captured_again(plan, given, _closed(dims, given, wrong), edit)
    captured = None if exported is None else _matching(plan, exported)
    if exported is None or captured is None:
        return None
    model = module_apart(exported)
    nodes = _told(plan, model, edit)
    if nodes is None:
        return None
    if not taken:
        return Way(_cut(plan, captured, model, nodes, edit), None)
    with contextlib.suppress(Exception):  # an argument that is computed from a size, where only a number will do
        return Way(_cut(plan, captured, model, nodes, edit), taken)
    return None


def _told(plan: Plan, module: GraphModule, edit: Edit | None) -> Alike | None:
    """Which nodes are those of the traced graph, if that is asked for; None where they can't be told."""
    return alike(plan.graph.capture.exported.graph.nodes, module) if plan.branches or edit is not None else {}


def _closed(dims: Any, given: Any, wrong: Dims) -> Any:
    """`dims` without those that turned out wrong: a graph that is told so refuses other sizes."""
    leaves, spec = pytree.tree_flatten(given)
    place = iter(range(len(leaves)))

    def closed(leaf: Any, which: Any) -> Any:
        at = next(place)
        left = {d: open_dim for d, open_dim in (which or {}).items() if (at, d) not in wrong}
        return left if isinstance(leaf, torch.Tensor) else which

    listed = spec.flatten_up_to(dims)
    return pytree.tree_unflatten([closed(leaf, which) for leaf, which in zip(leaves, listed, strict=True)], spec)


def _cut(plan: Plan, captured: _Captured, module: GraphModule, nodes: Alike | None, edit: Edit | None) -> GraphModule:
    _rewrite_calls(module, captured)
    if plan.branches:
        omit(plan, module, nodes or {})
    if edit is not None:
        edit(module, nodes or {})
    _narrow_tensors(module, plan.graph, captured)
    _forget_devices(module)
    write_without_gradients(module)
    follow_modes(module, plan.graph.model)
    return GraphForm.of(module)


def _exported(graph: DependencyGraph, inputs: Any, dims: Any) -> ExportedProgram | None:
    """torch.export's capture of the model with `dims` left open; None where there is none."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)  # torch leaves marks on them
    model = graph.model
    with contextlib.suppress(Exception), dumps_dropped(), quiet(model), torch.no_grad(), keywords_named(model, kwargs):
        shapes = _by_name(graph, dims)
        with unwritten(model, *args, kwargs), data_by_operators(model), none_involved(model), by_operators(model):
            return inlined(torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False))
    return None


def _matching(plan: Plan, exported: ExportedProgram) -> _Captured | None:
    """The cut in terms of another capture, if it is the same there; None otherwise."""
    graph = plan.graph
    held = held_by(graph.model)
    try:
        program = lower(exported, held=held)
    except Exception:
        return None
    if graph.capture.trained:
        with quiet(graph.model), torch.no_grad():
            program = related_in_training(graph.model, (graph.args, graph.kwargs), program, held) or program
    classes = Classes.of(program, graph.free)
    widths = Widths(program, classes, build_axes(program, classes))
    if any(name not in widths.axes or widths.axes[name].size != graph[name].size for name in plan.removal):
        return None
    kept = widths.at(plan.removal)
    if written_targets(exported) != written_targets(graph.capture.exported):
        return None
    same = _narrowed(program, kept) == _narrowed(graph.capture.program, plan.kept())
    return _Captured(exported, program, kept) if same else None


def _taken(exported: ExportedProgram, given: Any) -> Taken:
    """The captured input tensors, by their places among the flattened inputs; empty where no dim of any is open."""
    nodes = {node.name: node for node in exported.graph.nodes}
    places = zip(pytree.tree_leaves(given), exported.graph_signature.user_inputs, strict=False)
    taken = {
        place: TakenInput(name, tuple(map(_settled, nodes[name].meta["val"].shape)))
        for place, (leaf, name) in enumerate(places)
        if isinstance(leaf, torch.Tensor) and name in nodes
    }
    return taken if any(isinstance(size, torch.SymInt) for one in taken.values() for size in one.shape) else {}


def _settled(size: int | torch.SymInt) -> int | torch.SymInt:
    """A symbol that turned out to be a number, as a number."""
    return size if isinstance(size, torch.SymInt) and size.node.expr.free_symbols else int(size)


def _narrowed(program: Program, kept: Kept) -> dict[tuple[str, int], bytes]:
    """What stays of every parameter and buffer that gets smaller."""
    stored = (value for value in program.values.values() if value.kind in ("parameter", "buffer"))
    left = {(value.target, d): kept.of(value, d) for value in stored for d in range(len(value.shape))}
    return {place: stays.tobytes() for place, stays in left.items() if stays is not None}


def _two_of_each(inputs: Any) -> Any:
    """Example inputs whose batch is one, twice: torch.export takes a size of one for a constant."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return inputs
    return pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, torch.Tensor) and t.ndim else t, inputs)


def _all_dims(leaf: Any) -> Any:
    return dict.fromkeys(range(leaf.ndim), Dim.AUTO) if isinstance(leaf, torch.Tensor) else None


def _batch_and_sequence(leaf: Any) -> Any:
    """Batch, and for anything of two or three dims the sequence too."""
    if not isinstance(leaf, torch.Tensor):
        return None
    return dict.fromkeys(range(min(leaf.ndim, 2 if leaf.ndim <= 3 else 1)), Dim.AUTO)


def _by_name(graph: DependencyGraph, shapes: Any) -> Any:
    args, kwargs = shapes
    return {**inspect.signature(graph.model.forward).bind_partial(*args).arguments, **kwargs}


def _rewrite_calls(module: GraphModule, captured: _Captured) -> None:
    theirs = [n for n in captured.exported.graph.nodes if n.op == "call_function"]
    ours = [n for n in module.graph.nodes if n.op == "call_function"]
    copies = []
    for mine, node in zip(ours, theirs, strict=True):
        if not hasattr(node.target, "_schema"):
            continue
        if mine.target is torch.ops.aten.view_as_complex.default:  # asks for even strides, which a cut may make odd
            with module.graph.inserting_before(mine):
                rows: dict[str, Any] = {"memory_format": torch.contiguous_format}
                mine.args = (module.graph.call_method("clone", mine.args, rows),)
        changed = rewrite(node, captured.program.values, captured.kept, actual=mine)
        if changed is None:
            continue
        args, kwargs = call_arguments(changed, actual=mine)
        if changed.target is not None:
            mine.target = changed.target
            copies += [mine] if mine.target is torch.ops.aten.index_select.default else []
        with module.graph.inserting_before(mine):
            mine.args = tuple(_held(module, arg) for arg in args)
            mine.kwargs = {name: _held(module, arg) for name, arg in kwargs.items()}
    write_back(module, copies)


def _held(module: GraphModule, argument: Any) -> Any:
    """A tensor argument as a buffer of the module, a share of a size as a number that the graph computes."""
    if isinstance(argument, Share):
        whole = module.graph.call_function(operator.mul, (argument.size, argument.left.numerator))
        return module.graph.call_function(operator.floordiv, (whole, argument.left.denominator))
    if isinstance(argument, list):
        return [_held(module, one) for one in argument]
    if not isinstance(argument, torch.Tensor):
        return argument
    name = f"_cut_index_{sum(n.startswith('_cut_index_') for n in module._buffers)}"
    module.register_buffer(name, argument)
    return module.graph.get_attr(name)


def _narrow_tensors(module: GraphModule, graph: DependencyGraph, captured: _Captured) -> None:
    """Every tensor of the program becomes its own, narrowed where the cut says so; ties stay tied."""
    tensors = graph.tensors()
    fresh: dict[int, torch.Tensor] = {}
    by_target = {v.target: v for v in captured.program.values.values() if v.target}
    wanted = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    names = apart_in(captured.exported.graph_signature)
    for name in sorted(str(w) for w in wanted):
        target = names.here(name)
        value = by_target.get(target)
        old = tensors.get(target, captured.exported.constants.get(target))
        if value is None or old is None:
            continue
        if id(old) not in fresh:
            fresh[id(old)] = new_tensor(old, captured.kept, value)
        _put(module, name, fresh[id(old)])


def _forget_devices(module: GraphModule) -> None:
    """Let go of assertions that tensors are where they were captured, in their precision: the module may be moved."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)


def _of_one_size(module: GraphModule, inputs: Any) -> GraphModule:
    """Let it refuse inputs of other sizes: the numbers in it are of these, and with others it might run and be wrong."""
    given, leaves = module.graph.find_nodes(op="placeholder"), pytree.tree_leaves(inputs)
    said = "the graph form takes only size {} of dimension {} of {!r}, as it was captured at the example's sizes"
    with module.graph.inserting_before(given[-1].next):
        for node, leaf in zip(given, leaves, strict=True):
            for d, size in enumerate(leaf.shape) if isinstance(leaf, torch.Tensor) else ():
                same = module.graph.call_function(operator.eq, (module.graph.call_method("size", (node, d)), size))
                module.graph.call_function(torch._assert, (same, said.format(size, d, node.name)))
    module.recompile()
    return module


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    prefix, _, last = name.rpartition(".")
    holder = module.get_submodule(prefix)
    for store in (holder._parameters, holder._buffers):
        if last in store:
            store[last] = tensor  # type: ignore[assignment]
            return
    setattr(holder, last, tensor)
