"""What holds parts alike, one for each index of some dim: containers of modules, and tensors in which parts are stacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.fx import Node

from depgraph.axes import Owners
from depgraph.capture.exported import decisions_of
from depgraph.capture.lowering import GIVEN, INPUT, OUTPUT
from depgraph.capture.places import module_path
from depgraph.classes import NONE
from depgraph.cutting.barring import chosen_among
from depgraph.cutting.entries import contents, is_container, kinds
from depgraph.operators import operator_name
from depgraph.walks import moving

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.graph import Value

HARD = frozenset([INPUT, OUTPUT, GIVEN])
_MATRIX = 2
_JOINING = ("stack", "cat", "concat", "concatenate")


@dataclass(frozen=True)
class ListOfParts:
    """A container of modules of which `alike` are, and share nothing: its path, and by entry what it holds and computes."""

    path: str
    alike: tuple[bool, ...]
    tensors: tuple[frozenset[str], ...]
    nodes: tuple[frozenset[str], ...]
    plain: bool = False
    """Is it a module that has them among other children, and no container?"""

    @property
    def size(self) -> int:
        return sum(self.alike)

    @property
    def loose(self) -> bool:
        """Is each part a parameter, and no module?"""
        return all(name.rpartition(".")[0] == self.path for held in self.tensors for name in held)

    @property
    def owner(self) -> str:
        return self.path if self.plain else self.path.rpartition(".")[0]

    @property
    def where(self) -> tuple[str, ...]:
        """The modules that hold the parts."""
        return (self.path,)

    def holds(self, target: str) -> bool:
        """Is a tensor within a part, or elsewhere in the container?"""
        return any(target in held for held in self.tensors) or not self.plain and target.startswith(f"{self.path}.")

    def spread(self, labels: np.ndarray) -> np.ndarray:
        """The labels of the parts over all entries, -1 for the others."""
        found = np.full(len(self.alike), NONE)
        found[np.flatnonzero(self.alike)] = labels[: self.size]
        return found


@dataclass(frozen=True)
class StackOfParts:
    """A class of dims, by its number, along which tensors hold parts that the code takes one by one: the tensors' names."""

    number: int
    size: int
    targets: tuple[str, ...]
    plain: bool = True

    @property
    def owner(self) -> str:
        return self.where[0]

    @property
    def where(self) -> tuple[str, ...]:
        """The modules that hold the tensors."""
        return tuple(dict.fromkeys(target.rpartition(".")[0] for target in self.targets))

    def holds(self, target: str) -> bool:
        return target in self.targets


Holder = ListOfParts | StackOfParts


class Holders:
    """The holders of a graph, and the dims of what lies near them that their parts may stand for."""

    def __init__(self, graph: DependencyGraph, owners: Owners) -> None:
        self.graph = graph
        self.owners = owners

    @cached_property
    def found(self) -> list[Holder]:
        """Containers first, each in the order of the model; stacks only where something is chosen."""
        return [*_lists(self.graph), *(self._stacks() if self.routing else ())]

    @cached_property
    def routing(self) -> frozenset[int]:
        """The classes of dims of parameters that hold all their indices, among whose indices the forward chooses, or shares out."""
        among = {number for _, number in chosen_among(self.graph)} & self.owners.keys() & self._computed
        return frozenset(number for number in among if self._outside(number) and self._is_held(number))

    @cached_property
    def together(self) -> dict[int, list[Holder]]:
        """By class of dims, the holders nearest to it whose parts may stand for its first indices; all have as many parts."""
        found: dict[int, list[tuple[int, int, Holder]]] = {}
        for one in self.found:
            for number, depth in self._nearest(one).items():
                found.setdefault(number, []).append((depth, one.size, one))
        most = {number: max((depth, size) for depth, size, _ in near) for number, near in found.items()}
        return {n: [one for depth, size, one in near if (depth, size) == most[n]] for n, near in found.items()}

    def _nearest(self, one: Holder) -> dict[int, int]:
        """The classes of dims of the parameters outside of a holder that lie nearest to it, and how much of their path is the same.

        They can't lose anything, and are as large, or something is chosen among their indices and some have no part.
        """
        if isinstance(one, StackOfParts) and one.number in self.routing:
            return {one.number: len(one.owner)}
        near = dict[int, tuple[int, bool]]()
        for number in self.owners:
            size, chosen = self.graph.classes.size[number], number in self.routing
            may = size >= one.size if chosen else size == one.size and not one.plain and self._is_made(number)
            outside = self._outside(number) if may else []
            if outside and not any(one.holds(v.target) for v in outside):
                depth = max(_shared(one.owner, v.target.rpartition(".")[0]) for v in outside)
                near[number] = depth, size == one.size
        best = max(near.values(), default=None)
        return {number: place[0] for number, place in near.items() if place == best}

    def _is_made(self, number: int) -> bool:
        """Is it fixed, and the dim of something that is computed from the inputs?"""
        classes = self.graph.classes
        fixed = number in classes.fixed_whole or number in classes.fixed
        return fixed and number in self._computed and self._is_held(number)

    @cached_property
    def _moving(self) -> frozenset[str]:
        """The names of what is computed from the inputs."""
        values = self.graph.capture.program.values
        return frozenset(node.name for node in moving(self.graph.capture.exported.graph.nodes, values)) & values.keys()

    @cached_property
    def _computed(self) -> frozenset[int]:
        values, of_dim = self.graph.capture.program.values, self.graph.classes.of_dim
        return frozenset(int(of_dim[d]) for name in self._moving for d in values[name].dims)

    def _outside(self, number: int) -> list[Value]:
        """The parameters with dims of a class, and where there are none the buffers, if all are used."""
        held = self._parameters(number) or [v for v, _ in self.owners[number] if v.kind == "buffer"]
        return held if all(value.used for value in held) else []

    def _parameters(self, number: int) -> list[Value]:
        return [v for v, _ in self.owners[number] if v.kind == "parameter"]

    def _is_held(self, number: int) -> bool:
        """Can none of its indices go, for no other reason than what is done with them?"""
        classes = self.graph.classes
        whole, some = classes.fixed_whole.get(number), classes.fixed.get(number, {})
        if any(reason.why in HARD for reason in ([whole] if whole else some.values())):
            return False
        return not any(self.graph[name].prunable.any() for name in self.graph.widths.reaching.get(number, ()))

    def _stacks(self) -> Iterator[StackOfParts]:
        """Dims of stacked tensors, and of what is a view of some; what the parts of these stand for may have the same class."""
        sizes = self.graph.classes.size
        largest = max(sizes[number] for number in self.routing)
        for number, tensors in self._holding().items():
            if not 1 < sizes[number] <= largest or not self._is_held(number):
                continue
            held = {value.name: (value, self._held_by(value)) for value in tensors}
            widest = max((_wide(value) for value, names in held.values() if names), default=0)
            if widest > _MATRIX or widest == _MATRIX and number not in self.routing:
                targets = dict.fromkeys(name for _, names in held.values() for name in names)
                yield StackOfParts(number, sizes[number], tuple(targets))

    def _holding(self) -> dict[int, list[Value]]:
        """By class of dims, the parameters that have it, and what is computed from parameters alone."""
        found: dict[int, list[Value]] = {number: held for number in self.owners if (held := self._parameters(number))}
        for name, value in self.graph.capture.program.values.items():
            if value.kind == "activation" and name not in self._moving:
                for dim in value.dims:
                    found.setdefault(int(self.graph.classes.of_dim[dim]), []).append(value)
        return found

    def _held_by(self, value: Value) -> list[str]:
        """The used parameters that a value is, or is computed from; none behind what joins tensors, whose parts are these."""
        values, found = self.graph.capture.program.values, list[str]()
        queue, seen = [self._nodes[value.name]] if value.name in self._nodes else [], set[Node]()
        while queue:
            node = queue.pop()
            held = values.get(node.name)
            if held is not None and held.kind == "parameter" and held.used:
                found.append(held.target)
            if operator_name(node.target) in _JOINING:
                continue
            queue += [given for given in node.all_input_nodes if given not in seen]
            seen.update(node.all_input_nodes)
        return found

    @cached_property
    def _nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.graph.capture.exported.graph.nodes}


def _wide(value: Value) -> int:
    """How many dims it has that are wider than one."""
    return sum(size > 1 for size in value.shape)


def _shared(one: str, other: str) -> int:
    """How many parts two paths share at their beginning."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _lists(graph: DependencyGraph) -> Iterator[ListOfParts]:
    ties, named = graph.capture.program.ties, dict[str, set[str]]()
    for name, first in ties.items():
        named.setdefault(first, set()).add(name)
    held, computed = _by_module((name, name) for name in ties), _computed(graph)
    for path, module in graph.model.named_modules():
        paths = {name: f"{path}.{name}" if path else name for name in contents(module)}
        for alike in _alike(module):
            tensors = {n: frozenset(held.get(paths[n], [paths[n]] if paths[n] in ties else ())) for n in alike}
            if all(names and all(named[ties[n]] <= names for n in names) for names in tensors.values()):
                yield ListOfParts(
                    path,
                    tuple(name in alike for name in paths),
                    tuple(tensors.get(name, frozenset()) for name in paths),
                    tuple(frozenset(computed.get(paths[name], ())) if name in alike else frozenset() for name in paths),
                    not is_container(module),
                )


def _alike(module: nn.Module) -> list[set[str]]:
    """The children, or parameters, of a module that are alike, by name: at least two, and of what runs its children in turn all."""
    found: dict[object, set[str]] = {}
    for name, kind in kinds(module).items():
        found.setdefault(kind, set()).add(name)
    least = len(module._modules) if isinstance(module, nn.Sequential) else 2
    return [names for names in found.values() if len(names) >= max(least, 2)]


def _computed(graph: DependencyGraph) -> dict[str, set[str]]:
    """The operators that go with a module, or a parameter, by its path: none where inputs decide, as others are computed instead."""
    if decisions_of(graph.capture.exported) is not None:
        return {}
    nodes = list(graph.capture.exported.graph.nodes)
    return _by_module((f"{module_path(node)}.", node.name) for node in nodes) | _reading(graph, nodes)


def _reading(graph: DependencyGraph, nodes: list[Node]) -> dict[str, set[str]]:
    """The operators that each parameter goes into, as it is or viewed, but those that join it to others."""
    found, of = dict[str, set[str]](), dict[Node, str]()
    values = graph.capture.program.values
    for node in nodes:
        if node.op == "placeholder" and node.name in values and values[node.name].kind == "parameter":
            of[node] = values[node.name].target
        elif len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in of:
            of[node] = of[node.all_input_nodes[0]]
        elif operator_name(node.target) not in _JOINING:
            for given in of.keys() & set(node.all_input_nodes):
                found.setdefault(of[given], set()).add(node.name)
    return found


def _by_module(named: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """What lies within each module, by its path, from pairs of the path of something in it and what that is."""
    found: dict[str, set[str]] = {}
    for path, what in named:
        outer = path.rpartition(".")[0]
        while outer:
            found.setdefault(outer, set()).add(what)
            outer = outer.rpartition(".")[0]
    return found
