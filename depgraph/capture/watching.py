"""The function mode that sees every torch call of a forward with its integers still in the arguments."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from depgraph.capture import proxies
from depgraph.capture.boxes import boxed
from depgraph.capture.data import BY_OPERATORS
from depgraph.capture.expressions import parts
from depgraph.capture.frames import here, where
from depgraph.capture.hooking import hooked
from depgraph.capture.matching import Path, Python, Source, given_expressions, sources
from depgraph.capture.remembering import asked_anew
from depgraph.capture.sizes import (
    Attr,
    Expr,
    Op,
    ShapeOf,
    SizeInt,
    observing,
    plain,
    tracked_extreme,
    tracked_product,
    tracked_root,
)

_names: dict[Any, str] = {}
_CONSTANT_MAKERS = frozenset({torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor})


class Call(NamedTuple):
    """A torch call that returned tensors: the nodes made in it, the node and the shape of each returned tensor, the line.

    Nodes are missing, and outputs None, where dead code was eliminated and in a replay, which doesn't say where either. A
    replay also lists `numbers`: the floats that the call was given, and its result if that is a single number.
    """

    function: str
    nodes: tuple[str, ...]
    outputs: tuple[str | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    where: str
    numbers: tuple[float, ...] = ()


@dataclass
class Log:
    """What a watched forward did; the observer of its sizes (`sizes.Observer`)."""

    calls: list[Call] = field(default_factory=list)
    sources: dict[str, dict[Path, Source]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    comparisons: dict[tuple[Expr, Expr, bool, str], None] = field(default_factory=dict)
    orders: dict[tuple[str, Expr, Expr, str], None] = field(default_factory=dict)
    leaks: list[tuple[Expr, str]] = field(default_factory=list)
    symbolics: dict[tuple[str, int], set[Expr]] = field(default_factory=dict)
    lost: dict[CodeType | None, dict[int, set[Expr]]] = field(default_factory=dict)
    lines: dict[tuple[CodeType | None, str, int, str], Expr] = field(default_factory=dict)
    tracer: Any = None

    def compared(self, left: Expr, right: Expr, equal: bool) -> None:
        """See `sizes.Observer`."""
        if left != right:
            self.comparisons.setdefault((left, right, equal, where()))

    def ordered(self, name: str, left: Expr, right: Expr) -> None:
        """See `sizes.Observer`."""
        if left != right:
            self.orders.setdefault((name, left, right, where()))

    def leaked(self, expr: Expr) -> None:
        """See `sizes.Observer`."""
        self.leaks.append((expr, where()))

    def recovered(self, expr: Expr) -> None:
        """See `sizes.Observer`."""
        within = set(parts(expr))
        for position in range(len(self.leaks) - 1, -1, -1):
            if self.leaks[position][0] in within:
                within.discard(self.leaks.pop(position)[0])

    def converted(self, expr: Expr, value: int) -> None:
        """See `sizes.Observer`. A line that runs again, for another layer, lets go of what it made before."""
        place, code = here()
        exprs = self.lost.setdefault(code, {}).setdefault(value, set())
        line = code, place, value, _without_places(expr)
        if line in self.lines:
            exprs.discard(self.lines[line])
        self.lines[line] = expr
        exprs.add(expr)
        self.leaked(expr)  # what is computed from an ordinary number goes unseen

    def symbolic(self, name: str, value: int, expr: Expr) -> None:
        """See `sizes.Observer`."""
        self.symbolics.setdefault((name, value), set()).add(expr)


def _without_places(expr: Expr) -> str:
    """An expression as text that doesn't say which tensor, or whose attribute, a number is of."""
    if isinstance(expr, Op):
        return f"{expr.name}({', '.join(map(_without_places, expr.operands))})"
    if isinstance(expr, ShapeOf):
        return f"shape[{expr.dim}]"
    return expr.name if isinstance(expr, Attr) else str(expr)


class Watch(TorchFunctionMode):
    """Writes every torch call that returns tensors into `log`, and lets shapes remember whose they are."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` as it is; shapes come back with expressions, other calls are recorded."""
        kwargs = kwargs or {}
        tracer = self.log.tracer
        if tracer is None:
            result = func(*args, **kwargs)
            self._follow(func, args, kwargs, result)
            return result
        query = _QUERIES.get(func)
        if query is not None:
            return query(func(*args, **kwargs), args, kwargs, tracer)
        before = proxies.last_node(tracer)
        result = BY_OPERATORS.get(func, func)(*args, **kwargs)
        made = proxies.nodes_after(tracer, before)
        self._record(func, result, made)
        if made:
            self._find_sources(made, func, args, kwargs)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Write down a call of a replay: what it made, and the numbers in it."""
        if isinstance(result, Tensor):
            shapes: tuple[tuple[int, ...], ...] = (tuple(result.shape),)
        else:
            shapes = tuple(tuple(one.shape) for one in _tensors(result))
        if shapes:
            numbers = _numbers(args, kwargs, result)
            self.log.calls.append(Call(_name(func), (), (None,) * len(shapes), shapes, "", numbers))

    def _record(self, func: Any, result: Any, made: list[torch.fx.Node]) -> None:
        tensors = tuple(_tensors(result))
        if not tensors:
            return
        nodes = tuple(proxies.node_of(one, self.log.tracer) for one in tensors)
        self.log.calls.append(
            Call(
                function=_name(func),
                where=where(),
                nodes=tuple(node.name for node in made),
                outputs=tuple(None if node is None else node.name for node in nodes),
                shapes=tuple(tuple(map(proxies.size_hint, one.shape)) for one in tensors),
            )
        )

    def _find_sources(self, made: list[torch.fx.Node], func: Any, args: Any, kwargs: Any) -> None:
        place, code = here()
        lost = self.log.lost.get(code, {})
        for node in made:
            self.log.places[node.name] = place
            if found := sources(node, Python(func, args, kwargs, lost)):
                self.log.sources[node.name] = found
        if func in _CONSTANT_MAKERS:
            for expr in given_expressions((args, kwargs)):
                self.log.leaked(expr)


@contextmanager
def watched(model: nn.Module, log: Log, finish: Callable[[Any], None]) -> Iterator[None]:
    """Within, a forward of `model` (its hooks included) is written into `log`.

    `finish(tracer)` runs when the forward has ended. Hooks bring the mode in: they leave the module's path, its
    signature and its proxies (torch stands these in for modules that are shared) as they are.
    """
    inside = ExitStack()
    depth = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1
        if depth > 1:  # a module that calls itself
            return
        log.tracer = proxies.active_tracer()
        inside.enter_context(proxies.open_functionals())
        if log.tracer is not None:
            inside.enter_context(observing(log))
            inside.enter_context(_extremes_products_and_roots())
            inside.enter_context(asked_anew())
        inside.enter_context(Watch(log))
        inside.enter_context(boxed())

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal depth
        depth -= 1
        if depth:
            return None
        tracer, log.tracer = log.tracer, None
        inside.close()
        finish(tracer)
        leaves, spec = pytree.tree_flatten(output)
        if not any(isinstance(leaf, SizeInt) for leaf in leaves):
            return None
        return pytree.tree_unflatten([plain(leaf) for leaf in leaves], spec)

    with proxies.function_mode_stack_kept(), inside, hooked(model, enter, leave):
        yield


@contextmanager
def _extremes_products_and_roots() -> Iterator[None]:
    before = builtins.max, builtins.min, np.prod, np.sqrt
    builtins.max, builtins.min = tracked_extreme("max", before[0]), tracked_extreme("min", before[1])
    np.prod, np.sqrt = tracked_product(before[2]), tracked_root(before[3])  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.max, builtins.min, np.prod, np.sqrt = before


def _numbers(args: Any, kwargs: Any, result: Any) -> tuple[float, ...]:
    """The floats that a call was given, and what it made if that is a single number."""
    given = [a for a in (*args, *kwargs.values()) if type(a) is float]
    if isinstance(result, Tensor) and not result.ndim and result.is_floating_point() and _has_numbers(result):
        with torch._C.DisableTorchFunction():  # asked for by us, not by the model: no decision
            given.append(float(result.detach().tolist()))  # type: ignore[arg-type]
    return tuple(given)


def _has_numbers(tensor: Tensor) -> bool:
    """Can they be read at once? Not within a transform of torch.func, where a tensor stands for many, or for a derivative."""
    return tensor.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _name(func: Any) -> str:
    try:
        return _names[func]
    except KeyError:
        pass
    owner = getattr(func, "__objclass__", None) or getattr(func, "__self__", None)
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(func)
    elif type(func).__name__ == "method-wrapper":
        name = f"Tensor.{getattr(owner, '__name__', '?')}"
    elif isinstance(owner, type) and issubclass(Tensor, owner):
        name = f"Tensor.{func.__name__}"
    else:
        name = f"{getattr(func, '__module__', None) or 'torch'}.{getattr(func, '__qualname__', repr(func))}"
        name = name.replace("_VariableFunctionsClass.", "").replace("torch._tensor.Tensor.", "Tensor.")
    return _names.setdefault(func, name)


def _whole_shape(shape: Any, args: Any, kwargs: Any, tracer: Any) -> Any:
    if not isinstance(shape, torch.Size):  # x.size(dim)
        return _one_size(shape, args, kwargs, tracer)
    node = proxies.node_of(args[0], tracer)
    return shape if node is None else torch.Size([_sized(size, node, dim) for dim, size in enumerate(shape)])


def _one_size(size: Any, args: Any, kwargs: Any, tracer: Any) -> Any:
    node = proxies.node_of(args[0], tracer)
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return size if node is None or not isinstance(dim, int) else _sized(size, node, dim % args[0].ndim)


def _element_count(count: Any, args: Any, kwargs: Any, tracer: Any) -> Any:
    shape = _whole_shape(args[0].shape, args, kwargs, tracer)
    return math.prod(shape) if isinstance(count, int) else count


def _sized(size: Any, node: torch.fx.Node, dim: int) -> Any:
    return SizeInt(size, ShapeOf(node.name, int(dim))) if isinstance(size, int) else size


def _device(device: Any, args: Any, kwargs: Any, tracer: Any) -> Any:
    return proxies.device_of(args[0], tracer) or device


def _on(kind: str) -> Query:
    """The query whether a tensor is on a kind of device."""

    def query(answer: Any, args: Any, kwargs: Any, tracer: Any) -> Any:
        device = proxies.device_of(args[0], tracer)
        return answer if device is None else device.type == kind

    return query


Query = Callable[[Any, Any, Any, Any], Any]
_QUERIES: dict[Any, Query] = {
    Tensor.device.__get__: _device,
    **{getattr(Tensor, f"is_{kind}").__get__: _on(kind) for kind in ("cpu", "cuda", "meta", "mps", "xpu")},
    Tensor.shape.__get__: _whole_shape,  # type: ignore[attr-defined]
    Tensor.size: _whole_shape,
    Tensor.numel: _element_count,
    Tensor.nelement: _element_count,
}
