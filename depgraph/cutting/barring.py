"""A model runs as if some of the indices that it chooses among weren't there: the reference for experts that leave.

Wherever an operator normalises over such indices or chooses among them, those that go are minus infinity, so that they have
no share and aren't chosen; in sums they are 0. The modules that go with them give zeros. The code decides by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.capture.exported import decisions_of
from depgraph.capture.places import module_path
from depgraph.capture.traced import Stacks, module_paths
from depgraph.operators import by_name, operator_name

if TYPE_CHECKING:
    from depgraph.capture.capturing import Capture
    from depgraph.dependency import DependencyGraph
    from depgraph.graph import Value

_OUT_OF_REACH = -float("inf")
_FILL = {
    **dict.fromkeys(["softmax", "log_softmax", "logsumexp", "topk", "max", "amax", "argmax"], _OUT_OF_REACH),
    **dict.fromkeys(["sort", "argsort"], _OUT_OF_REACH),
    "sum": 0.0,
}


class Place(NamedTuple):
    """Where an operator goes over a dim: in the forward of which module, and along which dim of what size."""

    module: str
    operator: str
    dim: int
    size: int


Bars = dict[Place, np.ndarray]
"""By place, the indices that aren't there."""


def bars_of(graph: DependencyGraph, removal: Mapping[str, Iterable[int]]) -> Bars:
    """The places at which the captured forward goes over what `removal` takes away (axis name -> groups)."""
    found: Bars = {}
    places = list(chosen_among(graph))
    for name, groups in removal.items():
        axis, gone = graph[name], list(groups)
        for place, number in places:
            if number in axis.labels:
                indices = np.flatnonzero(np.isin(axis.labels[number], gone))
                found[place] = np.union1d(found[place], indices) if place in found else indices
    return found


def chosen_among(graph: DependencyGraph) -> Iterator[tuple[Place, int]]:
    """Where the captured forward goes over a dim to choose among its indices or to share out, with the class of the dim."""
    for place, value, at in goes_over(graph.capture):
        yield place, int(graph.classes.of_dim[value.dim(at)])


def goes_over(capture: Capture) -> Iterator[tuple[Place, Value, int]]:
    """The same, with the value and its dim."""
    values, decisions = capture.program.values, decisions_of(capture.exported)
    seen: list[tuple[str, str, Value | None, Any]] = []
    for node in capture.exported.graph.nodes:
        name = operator_name(node.target).lstrip("_")
        if name in _FILL and node.all_input_nodes:
            seen.append((module_path(node), name, values.get(node.all_input_nodes[0].name), by_name(node).get("dim")))
    for asked in () if decisions is None else decisions.asked:
        name = asked.operator.split(".")[1] if "." in asked.operator else ""
        if name in _FILL:
            seen.append((asked.module, name, values.get(asked.node), asked.dim))
    for module, name, value, dim in seen:
        at = _single(dim)
        if value is not None and value.shape and at is not None:
            yield Place(module, name, at % len(value.shape), value.shape[at]), value, at


def _single(dim: Any) -> int | None:
    """The one dim that an operator goes along; None where it is several, or all."""
    if isinstance(dim, (list, tuple)):
        return int(dim[0]) if len(dim) == 1 else None
    return None if dim is None else int(dim)


class _Barred(TorchDispatchMode):
    def __init__(self, bars: Bars, stack: Stacks) -> None:
        super().__init__()
        self.bars = bars
        self.stack = stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        name = operator_name(func).lstrip("_")
        if name in _FILL and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            args = (self._filled(func, name, args, kwargs or {}), *args[1:])
        return func(*args, **(kwargs or {}))

    def _filled(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        source: Tensor = args[0]
        declared = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
        dim = _single({**declared, **given, **kwargs}.get("dim"))
        if dim is None or not source.ndim:
            return source
        module = next(reversed(self.stack[-1]), "")
        gone = self.bars.get(Place(module, name, dim % source.ndim, source.shape[dim]))
        if gone is None:
            return source
        return source.index_fill(dim, torch.from_numpy(gone).to(source.device), _FILL[name])


@contextmanager
def barred(model: nn.Module, bars: Bars, silent: Iterable[nn.Module]) -> Iterator[None]:
    """Within, forwards of `model` do without what `bars` names, and the modules `silent` give zeros."""
    stack: Stacks = [{}]

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, output)

    with ExitStack() as hooks:
        for module in silent:
            hooks.callback(module.register_forward_hook(nothing).remove)
        with module_paths(model, stack), _Barred(bars, stack):
            yield
