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
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.capture import proxies
from depgraph.capture.containers import see_inside
from depgraph.capture.data import check_memory_stays
from depgraph.capture.exported import DirectProgram
from depgraph.capture.few_steps import of_few_steps
from depgraph.capture.metas import Remembered
from depgraph.capture.signature import Names
from depgraph.capture.traced import Replaced, Traced, Unusual, module_paths

_aten = torch.ops.aten
_META = torch.device("meta")
_LARGEST_KNOWN = 250  # numbers in a tensor whose values are followed, as torch.export follows them


class _Traits(NamedTuple):
    """What must be known of an operator to run it on meta tensors."""

    reads_values: bool
    makes_from_nothing: bool
    changes_inputs: bool
    changes_shapes: bool
    random: bool
    name: str


class _Writer(proxies.OperatorMode):
    """Writes every ATen operator into the graph and runs it on meta tensors."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced)
        self.traced = traced
        self.traits: dict[Any, _Traits] = {}
        self.remembered = Remembered()

    def see_autocast(self) -> None:
        """It leaves tensors without data as they are."""
        raise Unusual("autocast")

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write one operator down; it gives meta tensors."""
        if func is _aten.lift_fresh.default:
            func = _aten.lift_fresh_copy.default
        if func not in self.traits:
            self.traits[func] = _traits(func, self.traced.graph)
        traits = self.traits[func]
        if proxies.must_be_apart(func, (args, kwargs)):
            with self:
                return func.decompose(*args, **(kwargs))
        call = _Call(self.traced)
        run_args = [call.take(a) for a in args]
        written = tuple(call.written)
        run_kwargs, written_kwargs = call.take_named(kwargs)
        if traits.reads_values:
            return _value(func, args, kwargs, self.traced)
        node = self.traced.graph.create_node("call_function", func, written, written_kwargs, traits.name)
        node.meta.update(self.traced.place())
        if traits.makes_from_nothing and not call.tensors:
            run_kwargs["device"] = _META
        if traits.changes_shapes:
            self._keep_shape(run_args[0])
        made = self._made(func, run_args, run_kwargs, traits)
        self._follow(made, node, call.device or _default_device(), traits)
        if func is _aten.lift_fresh_copy.default:
            _know(self.traced, made, args[0])
        elif self.traced.known and not traits.random:
            _follow_values(self.traced, func, (args, kwargs), call.tensors, made)
        in_place = run_args and made is run_args[0]
        return args[0] if in_place else made  # a parameter, whose stand-in it isn't for the code

    def _keep_shape(self, tensor: Tensor) -> None:
        """Let what is known of a tensor stay as it is: the tensor itself gets another shape, in place."""
        producer = self.traced.nodes[id(tensor)]
        if producer.meta["val"] is tensor:
            producer.meta["val"] = tensor.detach()

    def _made(self, func: Any, args: list[Any], kwargs: dict[str, Any], traits: _Traits) -> Any:
        def run() -> Any:
            return proxies.at_once(func, args, kwargs)

        def few() -> Any:
            return of_few_steps(func, args, lambda given: proxies.at_once(func, given, kwargs))

        if traits.changes_inputs or traits.makes_from_nothing or torch.is_grad_enabled():
            return run()
        return proxies.at_once(self.remembered, (func, args, kwargs, few), {})

    def _follow(self, made: Any, node: torch.fx.Node, device: torch.device, traits: _Traits) -> None:
        traced = self.traced
        if isinstance(made, Tensor):
            if made.device != _META:
                raise Unusual(f"{node.target} makes data")
            node.meta["val"] = made.detach() if traits.changes_inputs else made
            traced.follow(made, node, device)
            return
        if not isinstance(made, (tuple, list)):
            raise Unusual(f"{node.target} gives a {type(made).__name__}")
        node.meta["val"] = made
        for position, one in enumerate(made):
            if one is None:
                continue
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
            self.traced.asks_for_meta |= item == _META
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


def _traits(func: Any, graph: torch.fx.Graph) -> _Traits:
    if not isinstance(func, torch._ops.OpOverload):
        raise Unusual(f"{func} is a higher-order operator")
    check_memory_stays(func)
    tags = func.tags
    return _Traits(
        reads_values=torch.Tag.data_dependent_output in tags,
        makes_from_nothing=any(a.name == "device" for a in func._schema.arguments),
        changes_inputs=func._schema.is_mutable,
        changes_shapes=torch.Tag.inplace_view in tags,
        random=torch.Tag.nondeterministic_seeded in tags,
        name=graph._target_to_str(func.overloadpacket.__name__),
    )


def _default_device() -> torch.device:
    return torch.get_default_device()


def _value(func: Any, args: Any, kwargs: Any, traced: Traced) -> Any:
    """A number that the code asks for, where it follows from constants of the code alone."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(id(t) not in traced.known for t in tensors):
        raise Unusual(f"{func} asks for a value")
    return func(*_known_arguments(args, traced), **kwargs)


def _known_arguments(args: Any, traced: Traced) -> Any:
    return pytree.tree_map(lambda item: traced.known.get(id(item), item), args)


def _know(traced: Traced, made: Tensor, constant: Tensor) -> None:
    """The values of a small constant of the code."""
    if constant.device != _META and constant.numel() <= _LARGEST_KNOWN:
        traced.known[id(made)] = constant.clone()


def _follow_values(traced: Traced, func: Any, given: tuple[Any, Any], tensors: list[Tensor], made: Any) -> None:
    """The values of small tensors that are computed from constants of the code alone; `tensors` are those in `given`."""
    every = made if isinstance(made, (tuple, list)) else (made,)
    if not tensors or any(id(t) not in traced.known for t in tensors):
        for tensor in every:  # an operator in place may have spoiled it
            traced.known.pop(id(tensor), None)
        return
    args, kwargs = _known_arguments(given, traced)
    for tensor, value in zip(every, pytree.tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(value, Tensor) and value.numel() <= _LARGEST_KNOWN:
            traced.known[id(tensor)] = value


@contextmanager
def _same_tensors(model: nn.Module) -> Iterator[None]:
    """Raise Replaced where parameters are others afterwards, even if something fails within; Unusual where buffers are."""
    parameters, buffers = _identities(model)
    try:
        yield
    finally:
        now = _identities(model)
        others = [name for name, tensor in now[0].items() if parameters.get(name) != tensor]
        if others:
            raise Replaced(", ".join(others))
    if now[1] != buffers:
        raise Unusual("the forward replaces a buffer")


def _identities(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Which tensors are its parameters and buffers now, by name."""
    named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    parameters, buffers = ({name: id(tensor) for name, tensor in held} for held in named)
    return parameters, buffers


def capture_directly(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectProgram:
    """Capture `model`, which must not need gradients now.

    Raises:
        Unusual: only torch.export can capture this model; so it may with any other exception.
    """
    names = Names(model)
    traced = Traced(names)
    run_args, run_kwargs = traced.begin(args, kwargs)
    without_cudnn = torch.backends.cudnn.flags(
        enabled=False
    )  # as under torch.export: it stands in operators' arguments
    with (
        _same_tensors(model),
        proxies.exporting_flags(),
        without_cudnn,
        module_paths(model, traced.stack),
        _Writer(traced),
    ):
        output = model(*run_args, **run_kwargs)
    see_inside(output, f"an output of {type(model).__name__}")
    outputs = traced.leaves_of(output)
    traced.graph.output(tuple(outputs))
    for node in reversed(list(traced.graph.nodes)):
        if node.target is _aten.detach.default and not node.users:
            traced.graph.erase_node(node)
    if traced.asks_for_meta and not names.on_meta:
        raise Unusual("an operator makes a tensor on the device of the tensors that stand in")
    program = traced.program(output, outputs)
    program.given = traced.given()
    return program
