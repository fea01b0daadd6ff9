"""A graph under construction while a forward runs: whose node every tensor is, and in which module the code stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.capture import proxies
from depgraph.capture.deciding import Decisions
from depgraph.capture.exported import DirectProgram
from depgraph.capture.frames import where
from depgraph.capture.memory import Memory
from depgraph.capture.origins import Origins, Stack
from depgraph.capture.signature import Names, signature_of

_META = torch.device("meta")
_KINDS = (Tensor, nn.Parameter)


class Unusual(Exception):
    """The forward does something that only torch.export captures."""


class Replaced(Unusual):
    """The forward replaces the parameters named, which only module forms do again."""


Stacks = list[Stack]


@dataclass
class Traced(proxies.Tracer):
    """A graph under construction, and whose node every tensor is. All tensors are kept alive, so that ids stay theirs.

    `held` are the placeholders of what isn't an input: parameters, buffers, constants. `asks_for_meta` when an operator is
    given the device of the tensors that stand in.
    """

    names: Names
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    nodes: dict[int, torch.fx.Node] = field(default_factory=dict)
    devices: dict[int, torch.device] = field(default_factory=dict)
    known: dict[int, Tensor] = field(default_factory=dict)
    stand_ins: dict[int, Tensor] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    stack: Stacks = field(default_factory=lambda: [{}])
    first_input: torch.fx.Node | None = None
    asks_for_meta: bool = False
    held: set[torch.fx.Node] = field(default_factory=set)
    memory: Memory = field(init=False)
    origins: Origins = field(init=False)

    def __post_init__(self) -> None:
        self.origins = Origins(self.names.model)
        self.memory = Memory(self.alive)

    def node_of(self, tensor: Tensor) -> torch.fx.Node | None:
        """The node that stands for a tensor, None for a tensor that wasn't seen."""
        return self.nodes.get(id(self._known_as(tensor)))

    def device_of(self, tensor: Tensor) -> torch.device | None:
        """The device that the code is told, None for a tensor that wasn't seen."""
        return self.devices.get(id(self._known_as(tensor)))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Placeholders for all that the model holds and for its inputs; gives what the model is called with."""
        for name, tensor in self.names.held():
            self.placeholder(tensor, name)
        self.held.update(self.graph.nodes)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        named = zip(leaves, self.names.inputs(args, kwargs), strict=True)
        given = [self.placeholder(leaf, name) for leaf, name in named]
        self.first_input = next((n for n in list(self.graph.nodes)[len(leaves) and -len(leaves) :]), None)
        run_args, run_kwargs = pytree.tree_unflatten(given, spec)
        return run_args, run_kwargs

    def leaves_of(self, output: Any) -> list[Any]:
        """What the model gives, leaf by leaf: the nodes of tensors, anything else as it is."""
        leaves = pytree.tree_leaves(output)
        return [self.nodes[id(self.stand_in(leaf))] if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def program(self, output: Any, outputs: list[Any], decisions: Decisions | None = None) -> DirectProgram:
        """The finished program of a model that gave `output`, with the leaves `outputs`."""
        names, state = self.names, self.names.model.state_dict()
        integers = {n: t for n, t in state.items() if isinstance(t, Tensor) and not t.is_floating_point()}
        signature = signature_of(names, self.graph, outputs)
        spec = pytree.tree_structure(output)
        return DirectProgram(self.graph, signature, names.constants, integers, spec, decisions)

    def given(self) -> list[tuple[Tensor, torch.fx.Node]]:
        """What operators gave to the code, and the nodes that stand for it."""
        ours = {id(tensor) for tensor in self.stand_ins.values()}
        made = {id(tensor): tensor for tensor in self.alive if tensor.is_meta and id(tensor) not in ours}
        return [(tensor, self.nodes[key]) for key, tensor in made.items()]

    def placeholder(self, value: Any, name: str) -> Any:
        """A placeholder for a tensor, and what stands in for it; anything else stays as it is."""
        node = self.graph.placeholder(name)
        node.name = node.target = self.names.free(name)
        if not isinstance(value, Tensor):
            node.meta["val"] = value
            return value
        stand_in = self.stand_ins.get(id(value))
        if stand_in is None:
            stand_in = self.stand_ins[id(value)] = self.stand_in_for(value)
        node.meta["val"] = stand_in
        self.alive.append(value)
        self.follow(stand_in, node, self.names.away.get(id(value), value.device))
        return stand_in

    def stand_in_for(self, value: Tensor) -> Tensor:
        """What the code is given for a tensor of the model or an input: one without data."""
        return _without_data(value)

    def follow(self, tensor: Tensor, node: torch.fx.Node, device: torch.device) -> None:
        """From now on `node` stands for `tensor`."""
        key = id(tensor)
        self.nodes[key] = node
        self.devices[key] = device
        self.alive.append(tensor)

    def place(self) -> dict[str, Any]:
        """Where the code stands: in which modules, and at what line."""
        return {"nn_module_stack": self.origins.stack() or self.stack[-1], "place": where()}

    def stand_in(self, tensor: Tensor) -> Tensor:
        """The tensor without data for any that an operator is given; a new constant for one that wasn't seen."""
        found = self._known_as(tensor)
        if found is not None:
            return found
        beside = self.memory.beside(tensor)
        if proxies.in_backward() or any(
            self.nodes[id(self.stand_ins.get(id(one), one))] not in self.held for one in beside
        ):
            raise Unusual("a tensor was made of what the forward computes without an operator that is seen")
        if self.first_input is None:
            return self._constant(tensor)
        with self.graph.inserting_before(self.first_input):
            return self._constant(tensor)

    def _known_as(self, tensor: Tensor) -> Tensor | None:
        """A tensor as it was seen before: torch makes shallow copies, and autograd keeps some."""
        found = self.stand_ins.get(id(tensor))
        if found is not None:
            return found
        if id(tensor) in self.nodes:
            return tensor
        twin = None if proxies.is_wrapped(tensor) else self.memory.twin(tensor)
        if twin is None:
            return None
        if id(twin) in self.stand_ins:
            return self.stand_ins[id(twin)]
        self.follow(tensor, self.nodes[id(twin)], self.devices[id(twin)])
        return tensor

    def _constant(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta and not self.names.on_meta:
            raise Unusual("a constant was made where its data is lost, as by an index that is a list")
        target = self.names.constant(tensor, next(reversed(self.stack[-1]), ""))
        found: Tensor = self.placeholder(tensor, "c_" + target)
        self.held.add(self.nodes[id(found)])
        return found


def _without_data(tensor: Tensor) -> Tensor:
    if type(tensor) not in _KINDS or tensor.layout is not torch.strided:
        raise Unusual(f"a tensor of layout {tensor.layout} and class {type(tensor).__name__}")
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


@contextmanager
def module_paths(model: nn.Module, stack: Stacks) -> Iterator[None]:
    """Keep the end of `stack` at the path of the module whose forward runs, and at those that it runs in."""
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module))
        above = stack[-1]
        stack.append(above if path is None else {**above, path: (path, type(module).__qualname__)})

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
