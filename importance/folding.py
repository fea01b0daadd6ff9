"""Scales of normalisations multiplied into what reads their results, so that a stream has no preferred channels any more.

With z what a normalisation makes before its scale and shift, W (scale z + shift) = (W scale) z + W shift: the scale becomes ones,
and the shift goes into the readers' biases; where one of them has none, it stays, divided by the scale. A weight that stands for
two things (a table that is also the head) becomes two weights where they must differ from now on, or the scale becomes its mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg

from depgraph import DependencyGraph
from depgraph.capture.places import module_path
from depgraph.cutting.inserting import untie
from depgraph.errors import RotationError
from depgraph.graph import Program
from depgraph.operators import operator_name
from depgraph.walks import behind
from importance.readers import bias_at
from importance.stream_parts import Norm, Stream, Use

_MATRICES = ("linear", "addmm")


TIES = {
    "untie": "a table that is also the head becomes two weights, where a scale lies before the head",
    "keep": "it stays one, and that scale becomes its mean, which changes a little what is computed",
}


@dataclass
class Folded:
    """What tensors become, by name (float64), the names that no longer share a tensor, and those of scales that became means."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    flattened: tuple[str, ...] = ()


def fold(graph: DependencyGraph, streams: Iterable[Stream], ties: str = "untie") -> Folded:
    """What the tensors of a model become when the normalisations of its streams lose their scales; the model stays as it is.

    `ties`: one of `TIES`. Raises RotationError where a weight would have to be two things at once, or a scale isn't a parameter's.
    """
    folding = _Folding(graph)
    for stream in streams:
        written = {use.target for use in stream.writes}
        for norm in stream.norms:
            readers = [use for use in stream.reads if use.norm == norm]
            if ties == "keep" and norm.scale is not None and written & {use.target for use in readers}:
                folding.flatten(norm, readers)
                continue
            folding.norm(norm, readers, stream.width)
        folding.as_they_are(u for u in (*stream.writes, *stream.reads) if u.norm is None and u.op not in stream.scaled)
        for op, scale in stream.scaled.items():
            folding.writer(scale, [use for use in stream.writes if use.op is op], stream.width)
    return folding.done()


class _Folding:
    """Collects what every name must become; one tensor may be asked for in several ways under one name only if they agree."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self.program = graph.capture.program
        self.tensors = graph.tensors()
        self.factors: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.fixed: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.flattened: list[str] = []

    def norm(self, norm: Norm, readers: list[Use], width: int) -> None:
        ones = torch.ones(width, dtype=torch.float64)
        scale = ones if norm.scale is None else computed(self.graph, norm.scale).reshape(-1).expand(width)
        for use in readers:
            self._ask(use, scale)
        if norm.scale is not None:
            self._set(*solved(self.graph, norm.scale, ones))
        if norm.shift is not None:
            self._shift(norm, readers, scale)

    def flatten(self, norm: Norm, readers: list[Use]) -> None:
        """Let a scale be its mean, so that readers can stay as they are."""
        assert norm.scale is not None
        scale = computed(self.graph, norm.scale).reshape(-1)
        name, value = solved(self.graph, norm.scale, scale.mean().expand(len(scale)))
        self._set(name, value)
        if not torch.allclose(scale, scale.mean()):
            self.flattened.append(name)
        self.as_they_are(readers)

    def writer(self, scale: Node, uses: list[Use], width: int) -> None:
        """Multiply a scale of what is written into what writes it: weight and bias."""
        for use in uses:
            self._ask(use, computed(self.graph, scale).reshape(-1).expand(width))
        self._set(*solved(self.graph, scale, torch.ones(width, dtype=torch.float64)))

    def as_they_are(self, uses: Iterable[Use]) -> None:
        for use in uses:
            value = self.tensors.get(use.target)
            if value is not None:
                self._ask(use, torch.ones(value.shape[use.dim], dtype=torch.float64))

    def _shift(self, norm: Norm, readers: list[Use], scale: Tensor) -> None:
        assert norm.shift is not None
        shift = computed(self.graph, norm.shift).reshape(-1).expand(len(scale))
        biases = [bias_at(use.op, self.program.values) for use in readers]
        fit = all(operator_name(use.op.target) in _MATRICES for use in readers) and all(biases)
        if fit and len(set(biases)) == len(biases):
            for use, bias in zip(readers, biases, strict=True):
                weight = self.tensors[use.target].detach().double().cpu().movedim(use.dim, -1)
                self.added[bias] = weight @ shift
            self._set(*solved(self.graph, norm.shift, torch.zeros_like(shift)))
            return
        if bool((scale.abs() <= 1e-6 * scale.abs().max()).any()) and bool(shift.any()):
            raise RotationError(
                f"the normalisation {norm.where} can't be folded into its readers: its scale has zeros, and a reader has no bias "
                "to take its shift; prune the stream by another score"
            )
        self._set(*solved(self.graph, norm.shift, shift / scale if bool(shift.any()) else shift))

    def _ask(self, use: Use, factor: Tensor) -> None:
        """Want the tensor of a use with the channels along its dim multiplied."""
        before = self.factors[own_name(self.program, use)].setdefault(use.dim, factor)
        if not torch.allclose(before, factor, rtol=1e-9, atol=0):
            raise RotationError(
                f"{use.target!r} is used with different scales before it, or is part of the stream itself, so that no scale can be "
                "multiplied into it: give its uses weights of their own, or prune the stream by another score"
            )

    def _set(self, name: str, value: Tensor) -> None:
        before = self.fixed.setdefault(name, value)
        if not torch.allclose(before, value):
            raise RotationError(
                f"{name!r} scales several things: give them weights of their own, or prune by another score"
            )

    def done(self) -> Folded:
        """The new tensors, and what must be untied."""
        made: dict[str, Tensor] = dict(self.fixed)
        for name, factors in self.factors.items():
            tensor = self.tensors[name].detach()
            scaled = tensor.double().cpu()
            for dim, factor in factors.items():
                scaled = scaled * factor.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
            if any(not torch.equal(factor, torch.ones_like(factor)) for factor in factors.values()):
                made[name] = scaled
        for name, shift in self.added.items():
            made[name] = self.tensors[name].detach().double().cpu() + shift
        return Folded(*self._apart(made), tuple(self.flattened))

    def _apart(self, made: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Names of one tensor that are used in other ways than the others get a tensor of their own."""
        untied: list[str] = []
        for name in list(made):
            alike = [n for n, first in self.program.ties.items() if first == self.program.ties.get(name, name)]
            others = [n for n in alike if n != name and n in self.factors and n not in untied]
            if others and not all(n in made and torch.equal(made[n], made[name]) for n in others):
                untied.append(name)
        return made, tuple(untied)


def own_name(program: Program, use: Use) -> str:
    """Under which of its names a tensor is used: that of the module in which the operator stands."""
    names = [name for name, first in program.ties.items() if first == use.target] or [use.target]
    return next((name for name in names if name.rpartition(".")[0] == module_path(use.op)), use.target)


def computed(graph: DependencyGraph, node: Node, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """What a node that no input reaches comes to, float64 on the CPU; `tensors` are taken in place of the model's."""
    held = graph.tensors()

    def fetch(here: Node) -> Tensor:
        name = graph.capture.program.values[here.name].target
        return (tensors or {}).get(name, held[name].detach())

    return _computed(node, fetch).detach().double().cpu()


@torch.no_grad()
def _computed(node: Node, fetch: Callable[[Node], Tensor]) -> Tensor:
    if node.op != "call_function":
        return fetch(node)
    args = map_arg(node.args, lambda n: _computed(n, fetch))
    kwargs = map_arg(node.kwargs, lambda n: _computed(n, fetch))
    made: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return made


def solved(graph: DependencyGraph, node: Node, wanted: Tensor) -> tuple[str, Tensor]:
    """The parameter that a node is computed from, and what it must be for the node to come to `wanted` [channels].

    Raises RotationError where it isn't one parameter's, times a number and plus a number at most (as in `1 + weight`).
    """
    roots = _roots(graph, node)
    if len(roots) == 1:
        name, tensor = roots[0], graph.tensor(roots[0]).detach()
        zeros, ones = torch.zeros_like(tensor), torch.ones_like(tensor)
        base, slope = computed(graph, node, {name: zeros}), computed(graph, node, {name: ones})
        slope = slope - base
        if base.numel() == tensor.numel() == wanted.numel() and bool((slope != 0).all()):
            value = ((wanted.reshape(base.shape) - base) / slope).reshape(tensor.shape)
            if torch.allclose(
                computed(graph, node, {name: value.to(tensor)}), wanted.reshape(base.shape), rtol=1e-2, atol=1e-6
            ):
                return name, value
    raise RotationError(
        f"the scale of a normalisation, {' and '.join(roots) or node.name}, isn't one parameter of its own: prune the stream by "
        "another score"
    )


def _roots(graph: DependencyGraph, node: Node) -> list[str]:
    values = graph.capture.program.values
    roots = (n.name for n in behind([node]) if n.op != "call_function" and n.name in values)
    return list(dict.fromkeys(values[name].target for name in roots))


def put(model: nn.Module, tensors: Mapping[str, Tensor], untied: Iterable[str] = ()) -> None:
    """Write tensors into a model, in their dtypes and on their devices; those of `untied` become parameters of their own."""
    untie(model, untied)
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(tensor)


__all__ = ["TIES", "Folded", "computed", "fold", "own_name", "put", "solved"]
