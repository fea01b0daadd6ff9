"""The second way in: a forward captured on the real example inputs, where control flow or sizes follow from values.

torch.export refuses such code. Here the forward runs on real tensors, every operator becomes a graph node as in `direct`,
and what the code takes from values is written down as `Decisions`: numbers it asks for are plain numbers in the graph,
indices that it finds are constants. The graph holds for the way that the example took; a model that is cut is checked by
following the same decisions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.capture import proxies
from depgraph.capture.containers import see_inside
from depgraph.capture.data import check_memory_stays, check_strides
from depgraph.capture.deciding import DRAWS, WEIGHTS, Asked, Deciding, Decision, Decisions, Reading, copied
from depgraph.capture.exported import DirectProgram
from depgraph.capture.frames import where
from depgraph.capture.keeping import written_by
from depgraph.capture.signature import Names
from depgraph.capture.traced import Traced, Unusual, module_paths

_aten = torch.ops.aten
Held = dict[str, Tensor]


@dataclass
class _RealTraced(Traced):
    """As `Traced`, but every tensor stands for itself."""

    def stand_in_for(self, value: Tensor) -> Tensor:
        """The tensor itself."""
        if value.is_meta:
            raise Unusual("a tensor on the meta device has no values to decide by")
        return value


class _Recorder(Deciding):
    """Runs every operator and writes it into the graph; writes decisions down."""

    def __init__(self, traced: _RealTraced, decisions: Decisions) -> None:
        super().__init__(traced, decisions)
        self.traced = traced
        self.decided_by: list[torch.fx.Node] = []
        self.given: list[tuple[torch.fx.Node, Tensor, Tensor]] = []
        self.inputs: dict[int, frozenset[int]] = {}

    def write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A node for `func`, and what it makes."""
        if not isinstance(func, torch._ops.OpOverload):
            raise Unusual(f"{func} is a higher-order operator")
        if func is _aten.lift_fresh.default:
            func = _aten.lift_fresh_copy.default
        check_memory_stays(func)
        node = self._node(func, args, kwargs)
        made, draws = _with_draws(func, lambda: proxies.at_once(func, args, kwargs))
        check_strides(func, made)
        if not func._schema.is_mutable and not any(isinstance(t, Tensor) for t in pytree.tree_leaves(made)):
            self.traced.graph.erase_node(node)  # an assertion, or a question about sizes
            return made
        self._mark((made, written_by(func, args, kwargs)), self.follows_from((args, kwargs)) | draws)
        if isinstance(made, Tensor):
            node.meta["val"] = _shape_of(made)
            self._follow(made, node)
            return made
        node.meta["val"] = [None if one is None else _shape_of(one) for one in made]
        for position, one in enumerate(made):
            if one is None:
                continue
            item = self.traced.graph.call_function(operator.getitem, (node, position))
            item.meta.update(val=node.meta["val"][position], nn_module_stack=node.meta["nn_module_stack"])
            self._follow(one, item)
        return made

    def foreign(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decision where it gives integers only."""
        made = proxies.at_once(func, args, kwargs)
        tensors = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]
        if tensors and not any(t.is_floating_point() or t.is_complex() for t in tensors):
            return self.decide(func, (args, kwargs), lambda: made)
        return self.write(func, args, kwargs)

    def give(self, run_args: tuple[Any, ...], run_kwargs: dict[str, Any]) -> None:
        """These are the model's inputs."""
        held = [*self.traced.names.model.parameters(), *self.traced.names.model.buffers()]
        self._mark([tensor for tensor in held if tensor.is_floating_point()], frozenset([WEIGHTS]))
        for position, leaf in enumerate(pytree.tree_leaves((run_args, run_kwargs))):
            self._mark(leaf, frozenset([position]))

    def follows_from(self, operands: Any) -> frozenset[int]:
        """The positions of the inputs (and `WEIGHTS`) that tensors depend on, through views too."""
        tensors = (t for t in pytree.tree_leaves(operands) if isinstance(t, Tensor))
        return frozenset().union(*(self.inputs.get(proxies.storage_key(t), frozenset()) for t in tensors))

    def _mark(self, made: Any, inputs: frozenset[int]) -> None:
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and inputs:
                key = proxies.storage_key(tensor)
                self.inputs[key] = self.inputs.get(key, frozenset()) | inputs

    def notice(self, tensor: Tensor) -> None:
        """Let the graph give it, unless it comes of sizes alone, which a cut may change: what it decides is asked anew."""
        self.decisions.noticed.append(bool(self.follows_from(tensor)))
        if self.decisions.noticed[-1]:
            self.decided_by.append(self.traced.nodes[id(self.traced.stand_in(tensor))])

    def decide(self, func: Any, operands: Any, compute: Callable[[], Any], along: int | None = None) -> Any:
        """Write down what `compute` gives; tensors are constants of the graph."""
        result, draws = _with_draws(func, compute)
        inputs = self.follows_from(operands) | draws
        own = copied(result)
        self.decisions.made.append(Decision(str(func), where(), own, inputs))
        asked = [t for t in pytree.tree_leaves(operands) if isinstance(t, Tensor) and t.ndim]
        nodes = [self.traced.nodes[id(self.traced.stand_in(tensor))] for tensor in asked]
        given = [self.traced.stand_in(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        copies = [t for t in pytree.tree_leaves(own) if isinstance(t, Tensor)]
        self.given += [(self.traced.nodes[id(t)], t, copy) for t, copy in zip(given, copies, strict=True)]
        gives = self.traced.nodes[id(given[0])].name if len(given) == 1 else ""
        module = next(reversed(self.traced.stack[-1]), "")
        for tensor, node in zip(asked, nodes, strict=True):
            dim = None if along is None else along % tensor.ndim
            self.decisions.asked.append(Asked(node.name, dim, str(func), where(), gives, module))
        return result

    def give_copies(self) -> None:
        """What was decided and then written to is copied first in the graph, so that the constant stays what it was."""
        graph, constants = self.traced.graph, self.traced.names.constants
        names = {id(tensor): name for name, tensor in constants.items()}
        first = next(node for node in graph.nodes if node.op != "placeholder")
        for constant, now, before in self.given:
            if id(now) in names and not torch.equal(now, before):
                constants[names[id(now)]] = before
                with graph.inserting_before(first):
                    copy = graph.call_function(_aten.clone.default, (constant,))
                copy.meta.update(constant.meta)
                constant.replace_all_uses_with(copy)
                copy.args = (constant,)

    def _node(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node:
        def node_for(item: Any) -> Any:
            return self.traced.nodes[id(self.traced.stand_in(item))]

        written, named = pytree.tree_map_only(Tensor, node_for, (args, kwargs))
        graph = self.traced.graph
        name = graph._target_to_str(func.overloadpacket.__name__)
        node = graph.create_node("call_function", func, written, named, name)
        node.meta.update(self.traced.place())
        return node

    def _follow(self, made: Tensor, node: torch.fx.Node) -> None:
        self.traced.follow(made, node, made.device)


def capture_decided(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], decisions: Decisions
) -> DirectProgram:
    """Capture `model`, which must not need gradients now, on the values of the example inputs, and fill `decisions`.

    After the outputs that its signature names, the graph gives the floating tensors that are decided by, in order, unless
    the decisions are settled. What the forward writes to tensors stays; see `unwritten`.

    Raises:
        Unusual: the model can't be captured like that; so it may with any other exception.
    """
    traced = _RealTraced(Names(model))
    before = _held(model)
    copies = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    run_args, run_kwargs = traced.begin(*copies)
    recorder = _Recorder(traced, decisions)
    recorder.give(run_args, run_kwargs)
    with decisions.told(), module_paths(model, traced.stack), recorder, Reading(recorder):
        output = model(*run_args, **run_kwargs)
    see_inside(output, f"an output of {type(model).__name__}")
    outputs = traced.leaves_of(output)
    decided_by = [] if decisions.settled else recorder.decided_by
    replaced = _copy_replaced(model, before, traced)
    traced.graph.output((*outputs, *decided_by))
    recorder.give_copies()
    return replace(traced.program(output, outputs, decisions), replaced=", ".join(replaced))


def _copy_replaced(model: nn.Module, before: Held, traced: _RealTraced) -> list[str]:
    """Copy into each tensor of `before` what the forward put in its place, in the graph; gives those that have no room."""
    without_room = []
    for name, now in _held(model).items():
        old = before.get(name)
        if now is old:
            continue
        if old is None or (old.shape, old.dtype) != (now.shape, now.dtype):
            without_room.append(name)
            continue
        given = tuple(traced.nodes[id(traced.stand_in(tensor))] for tensor in (old, now))
        node = traced.graph.call_function(_aten.copy_.default, given)
        node.meta.update(val=_shape_of(old), nn_module_stack={}, place="")
    return without_room


def _held(model: nn.Module) -> Held:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _with_draws(func: Any, compute: Callable[[], Any]) -> tuple[Any, frozenset[int]]:
    """What `compute` gives, and `DRAWS` if it drew random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return compute(), frozenset()
    before = torch.get_rng_state()
    made = compute()
    drew = not proxies.at_once(torch.equal, (before, torch.get_rng_state()), {})
    return made, frozenset([DRAWS] if drew else [])


def _shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same layout without data."""
    return proxies.at_once(
        torch.empty_strided, (tensor.shape, tensor.stride()), {"dtype": tensor.dtype, "device": "meta"}
    )
