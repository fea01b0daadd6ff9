"""Capture without torch.export: the forward runs once on meta tensors and every ATen operator becomes a graph node.

The operators are seen where torch.export sees them, before autograd and before composite operators are taken apart, so the
graph is the same; the rest of what torch.export does (fake tensors, guards, passes, verification) takes most of its time and
isn't needed to find axes. Tensors without data stand in for the inputs and for all that is computed, while the code is told
the devices of the originals. Anything unusual raises `Unusual`, or whatever torch raises, and the caller takes torch.export
instead: values that are asked for, higher-order operators, autocast, function transforms, buffers that are replaced,
subclasses of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.capture import proxies
from depgraph.capture.exported import DirectProgram
from depgraph.capture.frames import where
from depgraph.capture.metas import Remembered
from depgraph.capture.signature import Names, signature_of

_aten = torch.ops.aten
_META = torch.device("meta")
_LARGEST_KNOWN = 250  # numbers in a tensor whose values are followed, as torch.export follows them
_KINDS = (Tensor, nn.Parameter)


class Unusual(Exception):
    """The forward does something that only torch.export captures."""


class _Traits(NamedTuple):
    """What must be known of an operator to run it on meta tensors."""

    reads_values: bool
    makes_from_nothing: bool
    changes_inputs: bool
    random: bool
    name: str


@dataclass
class Traced(proxies.Tracer):
    """A graph under construction, and whose node every tensor is. All tensors are kept alive, so that ids stay theirs."""

    names: Names
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    nodes: dict[int, torch.fx.Node] = field(default_factory=dict)
    devices: dict[int, torch.device] = field(default_factory=dict)
    known: dict[int, Tensor] = field(default_factory=dict)
    stand_ins: dict[int, Tensor] = field(default_factory=dict)
    from_nothing: dict[int, Tensor] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    stack: list[dict[str, tuple[str, str]]] = field(default_factory=lambda: [{}])
    first_input: torch.fx.Node | None = None

    def node_of(self, tensor: Tensor) -> torch.fx.Node | None:
        """The node that stands for a tensor, None for a tensor that wasn't seen."""
        return self.nodes.get(id(self._known_as(tensor)))

    def device_of(self, tensor: Tensor) -> torch.device | None:
        """The device that the code is told, None for a tensor that wasn't seen."""
        return self.devices.get(id(self._known_as(tensor)))

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
        self.follow(stand_in, node, value.device)
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

    def stand_in(self, tensor: Tensor) -> Tensor:
        """The tensor without data for any that an operator is given; a new constant for one that wasn't seen."""
        found = self._known_as(tensor)
        if found is not None:
            return found
        if self.first_input is None:
            return self._constant(tensor)
        with self.graph.inserting_before(self.first_input):
            return self._constant(tensor)

    def _known_as(self, tensor: Tensor) -> Tensor | None:
        """A tensor as it was seen before: torch gives a shallow copy of what operators make from nothing."""
        found = self.stand_ins.get(id(tensor))
        if found is not None:
            return found
        if id(tensor) in self.nodes:
            return tensor
        original = self.from_nothing.get(proxies.storage_key(tensor)) if self.may_be_copy(tensor) else None
        if original is not None:
            self.follow(tensor, self.nodes[id(original)], self.devices[id(original)])
            return tensor
        return None

    def may_be_copy(self, tensor: Tensor) -> bool:
        """Could a tensor that wasn't seen be the shallow copy of one?"""
        return tensor.is_meta

    def _constant(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta and not self.names.on_meta:
            raise Unusual("a constant was made where its data is lost, as by an index that is a list")
        target = self.names.constant(tensor, next(reversed(self.stack[-1]), ""))
        found: Tensor = self.placeholder(tensor, "c_" + target)
        return found


class _Writer(proxies.OperatorMode):
    """Writes every ATen operator into the graph and runs it on meta tensors."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced)
        self.traced = traced
        self.traits: dict[Any, _Traits] = {}
        self.remembered = Remembered()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Write one operator down; it gives meta tensors."""
        if func is _aten.lift_fresh.default:
            func = _aten.lift_fresh_copy.default
        if func not in self.traits:
            self.traits[func] = _traits(func)
        traits = self.traits[func]
        if proxies.transforming():
            raise Unusual("autocast or a function transform")
        call = _Call(self.traced)
        run_args = [call.take(a) for a in args]
        written = tuple(call.written)
        run_kwargs, written_kwargs = call.take_named(kwargs or {})
        if traits.reads_values:
            return _value(func, args, kwargs or {}, self.traced)
        name = self.traced.graph._target_to_str(traits.name)
        node = self.traced.graph.create_node("call_function", func, written, written_kwargs, name)
        node.meta["nn_module_stack"] = self.traced.stack[-1]
        node.meta["place"] = where()
        if traits.makes_from_nothing and not call.tensors:
            run_kwargs["device"] = _META
        made = self._made(func, run_args, run_kwargs, traits)
        self._follow(made, node, call.device or _default_device(), traits)
        if not traits.random and (self.traced.known or func is _aten.lift_fresh_copy.default):
            _follow_values(self.traced, func, args, kwargs or {}, made)
        return made

    def _made(self, func: Any, args: list[Any], kwargs: dict[str, Any], traits: _Traits) -> Any:
        def run() -> Any:
            return proxies.at_once(func, args, kwargs)

        if traits.changes_inputs or traits.makes_from_nothing:
            return run()
        return proxies.at_once(self.remembered, (func, args, kwargs, run), {})

    def _follow(self, made: Any, node: torch.fx.Node, device: torch.device, traits: _Traits) -> None:
        traced = self.traced
        if isinstance(made, Tensor):
            if made.device != _META:
                raise Unusual(f"{node.target} makes data")
            node.meta["val"] = made.detach() if traits.changes_inputs else made
            traced.follow(made, node, device)
            if traits.makes_from_nothing:
                traced.from_nothing[proxies.storage_key(made)] = made
            return
        if not isinstance(made, (tuple, list)):
            raise Unusual(f"{node.target} gives a {type(made).__name__}")
        node.meta["val"] = made
        for position, one in enumerate(made):
            item = traced.graph.call_function(operator.getitem, (node, position))
            item.meta.update(val=one, nn_module_stack=node.meta["nn_module_stack"])
            if not isinstance(one, Tensor) or one.device != _META:
                raise Unusual(f"{node.target} makes data")
            traced.follow(one, item, device)


class _Call:
    """The arguments of one operator: what it is run with, what is written down, and the tensors among them."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.written: list[Any] = []
        self.tensors: list[Tensor] = []
        self.device: torch.device | None = None

    def take(self, item: Any) -> Any:
        """Take the next argument; what is written down is appended to `written`."""
        kind = type(item)
        if isinstance(item, Tensor):
            stand_in = self.traced.stand_in(item)
            self.tensors.append(stand_in)
            self.written.append(self.traced.nodes[id(stand_in)])
            if self.device is None:
                self.device = self.traced.devices[id(stand_in)]
            return stand_in
        if kind in (list, tuple):
            start = len(self.written)
            run = kind([self.take(one) for one in item])
            self.written[start:] = [self.written[start:]]
            return run
        self.written.append(item)
        if kind is torch.device:
            self.device = item
            return _META
        return item

    def take_named(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same for keyword arguments."""
        run, written = {}, {}
        for name, item in kwargs.items():
            run[name] = self.take(item)
            written[name] = self.written[-1]
        return run, written


def _traits(func: Any) -> _Traits:
    if not isinstance(func, torch._ops.OpOverload):
        raise Unusual(f"{func} is a higher-order operator")
    tags = func.tags
    return _Traits(
        reads_values=torch.Tag.data_dependent_output in tags,
        makes_from_nothing=any(a.name == "device" for a in func._schema.arguments),
        changes_inputs=func._schema.is_mutable,
        random=torch.Tag.nondeterministic_seeded in tags,
        name=func.overloadpacket.__name__,
    )


def _default_device() -> torch.device:
    return torch.get_default_device()


def _without_data(tensor: Tensor) -> Tensor:
    if type(tensor) not in _KINDS or tensor.layout is not torch.strided:
        raise Unusual(f"a tensor of layout {tensor.layout} and class {type(tensor).__name__}")
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _value(func: Any, args: Any, kwargs: Any, traced: Traced) -> Any:
    """A number that the code asks for, where it follows from constants of the code alone."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(id(t) not in traced.known for t in tensors):
        raise Unusual(f"{func} asks for a value")
    return func(*_known_arguments(args, traced), **kwargs)


def _known_arguments(args: Any, traced: Traced) -> Any:
    return pytree.tree_map(lambda item: traced.known.get(id(item), item), args)


def _follow_values(traced: Traced, func: Any, args: Any, kwargs: Any, made: Any) -> None:
    """The values of small tensors that are computed from constants of the code alone."""
    if func is _aten.lift_fresh_copy.default:
        if args[0].device.type != "meta" and args[0].numel() <= _LARGEST_KNOWN:
            traced.known[id(made)] = args[0].clone()
        return
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors or any(id(t) not in traced.known for t in tensors):
        for tensor in pytree.tree_leaves(made):  # an operator in place may have spoiled it
            traced.known.pop(id(tensor), None)
        return
    values = func(*_known_arguments(args, traced), **_known_arguments(kwargs, traced))
    for tensor, value in zip(pytree.tree_leaves(made), pytree.tree_leaves(values), strict=True):
        if isinstance(value, Tensor) and value.numel() <= _LARGEST_KNOWN:
            traced.known[id(tensor)] = value


def capture_directly(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectProgram:
    """Capture `model`, which must not need gradients now.

    Raises:
        Unusual: only torch.export can capture this model; so it may with any other exception.
    """
    names = Names(model)
    traced = Traced(names)
    buffers = {name: id(tensor) for name, tensor in model.named_buffers(remove_duplicate=False)}
    for name, tensor in names.held():
        traced.placeholder(tensor, name)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = [traced.placeholder(leaf, name) for leaf, name in zip(leaves, names.inputs(args, kwargs), strict=True)]
    traced.first_input = next((n for n in list(traced.graph.nodes)[len(leaves) and -len(leaves) :]), None)
    run_args, run_kwargs = pytree.tree_unflatten(given, spec)
    without_cudnn = torch.backends.cudnn.flags(
        enabled=False
    )  # as under torch.export: it stands in operators' arguments
    with proxies.exporting_flags(), without_cudnn, module_paths(model, traced), _Writer(traced):
        output = model(*run_args, **run_kwargs)
    if buffers != {name: id(tensor) for name, tensor in model.named_buffers(remove_duplicate=False)}:
        raise Unusual("the forward replaces a buffer")
    outputs = [traced.nodes[id(traced.stand_in(o))] if isinstance(o, Tensor) else o for o in pytree.tree_leaves(output)]
    traced.graph.output(tuple(outputs))
    for node in reversed(list(traced.graph.nodes)):
        if node.target is _aten.detach.default and not node.users:
            traced.graph.erase_node(node)
    if not names.on_meta and _META in (a for n in traced.graph.nodes for a in pytree.tree_leaves((n.args, n.kwargs))):
        raise Unusual("an operator makes a tensor on the device of the tensors that stand in")
    signature = signature_of(names, traced.graph, outputs)
    integers = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor) and not t.is_floating_point()}
    return DirectProgram(traced.graph, signature, names.constants, integers, pytree.tree_structure(output))


@contextmanager
def module_paths(model: nn.Module, traced: Traced) -> Iterator[None]:
    """Keep `traced.stack` at the path of the module whose forward runs."""
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module))
        above = traced.stack[-1]
        traced.stack.append(above if path is None else {**above, path: (path, type(module).__qualname__)})

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        traced.stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
