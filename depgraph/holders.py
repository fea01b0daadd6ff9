"""What holds parts alike, one for each index of some dim: lists of modules, and tensors in which parts are stacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from torch import nn

from depgraph.axes import Owners
from depgraph.capture.exported import decisions_of
from depgraph.capture.lowering import GIVEN, INPUT, OUTPUT
from depgraph.capture.places import module_path

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.graph import Value

HARD = frozenset([INPUT, OUTPUT, GIVEN])
_MATRIX = 2


@dataclass(frozen=True)
class ListOfParts:
    """A list or dict of modules that are alike and share nothing: its path, and by entry what it holds and computes."""

    path: str
    tensors: tuple[frozenset[str], ...]
    nodes: tuple[frozenset[str], ...]

    @property
    def size(self) -> int:
        return len(self.tensors)

    @property
    def owner(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def where(self) -> tuple[str, ...]:
        """The modules that hold it."""
        return (self.path,)

    def holds(self, target: str) -> bool:
        return target.startswith(f"{self.path}.")


@dataclass(frozen=True)
class StackOfParts:
    """A class of dims, by its number, along which tensors hold parts that the code takes one by one: the tensors' names."""

    number: int
    size: int
    targets: tuple[str, ...]

    @property
    def owner(self) -> str:
        """What holds the modules that hold the tensors."""
        return self.where[0]

    @property
    def where(self) -> tuple[str, ...]:
        """The modules that hold them."""
        return tuple(dict.fromkeys(target.rpartition(".")[0] for target in self.targets))

    def holds(self, target: str) -> bool:
        return target in self.targets


Holder = ListOfParts | StackOfParts


class Holders:
    """The holders of a graph, and the fixed dims of what lies near them that their parts may stand for."""

    def __init__(self, graph: DependencyGraph, owners: Owners) -> None:
        self.graph = graph
        self.owners = owners

    @cached_property
    def found(self) -> list[Holder]:
        """Lists first, each in the order of the model."""
        return [*_lists(self.graph), *self._stacks()]

    @cached_property
    def computed(self) -> frozenset[int]:
        """The classes of dims of what is computed from the inputs."""
        values, moving = self.graph.capture.program.values, set[str]()
        for node in self.graph.capture.exported.graph.nodes:
            value = values.get(node.name)
            entered = node.op == "placeholder" and value is not None and value.kind == "input"
            if entered or any(given.name in moving for given in node.all_input_nodes):
                moving.add(node.name)
        of_dim = self.graph.classes.of_dim
        return frozenset(int(of_dim[d]) for name in moving if name in values for d in values[name].dims)

    def nearest(self, one: Holder) -> list[int]:
        """The classes of fixed dims as large as a holder, of the parameters outside of it that lie nearest to it."""
        near = dict[int, int]()
        for number, held in self.owners.items():
            if number not in self.computed or not self._fixed(number, one.size):
                continue
            parameters = [v for v, _ in held if v.kind == "parameter"]
            outside = [v for v in parameters if v.used and not one.holds(v.target)]
            if outside and len(outside) == len(parameters):
                near[number] = max(_shared(one.owner, v.target.rpartition(".")[0]) for v in outside)
        return [number for number, depth in near.items() if depth == max(near.values())]

    def _fixed(self, number: int, size: int) -> bool:
        """Is a class of that size and fixed, by more than that inputs or outputs have its size?"""
        classes = self.graph.classes
        whole, some = classes.fixed_whole.get(number), classes.fixed.get(number, {})
        hard = [reason.why in HARD for reason in ([whole] if whole else [*some.values()])]
        return classes.size[number] == size and bool(hard) and not any(hard)

    def _stacks(self) -> Iterator[StackOfParts]:
        sizes = self.graph.classes.size
        routing = {sizes[k] for k, held in self.owners.items() if self._routes(k, held)}
        for number, held in self.owners.items():
            size = sizes[number]
            if size not in routing or not self._fixed(number, size) or self._routes(number, held):
                continue
            targets = tuple(v.target for v, _ in held if v.kind == "parameter" and v.used)
            if any(_wide(v) >= _MATRIX for v, _ in held) and targets and size > 1:
                yield StackOfParts(number, size, targets)

    def _routes(self, number: int, held: list[tuple[Value, int]]) -> bool:
        """Is it a dim along which something is computed, by what isn't stacked?"""
        flat = any(v.kind == "parameter" and v.used and _wide(v) <= _MATRIX for v, _ in held)
        return flat and number in self.computed and self._fixed(number, self.graph.classes.size[number])


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
        entries = list(module._modules.items()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
        if len(entries) < 2 or len({_kind(entry) for _, entry in entries}) > 1:
            continue
        paths = [f"{path}.{key}" if path else key for key, _ in entries]
        tensors = tuple(frozenset(held.get(one, ())) for one in paths)
        if all(names and all(named[ties[name]] <= names for name in names) for names in tensors):
            yield ListOfParts(path, tensors, tuple(frozenset(computed.get(one, ())) for one in paths))


def _computed(graph: DependencyGraph) -> dict[str, set[str]]:
    """The operators that go with a module, by its path: none where inputs decide, as others are computed instead."""
    if decisions_of(graph.capture.exported) is not None:
        return {}
    return _by_module((f"{module_path(node)}.", node.name) for node in graph.capture.exported.graph.nodes)


def _by_module(named: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """What lies within each module, by its path, from pairs of the path of something in it and what that is."""
    found: dict[str, set[str]] = {}
    for path, what in named:
        outer = path.rpartition(".")[0]
        while outer:
            found.setdefault(outer, set()).add(what)
            outer = outer.rpartition(".")[0]
    return found


def _kind(entry: nn.Module | None) -> object:
    """Its class, and what it holds: of any size, as other cuts may have narrowed some entries."""
    if entry is None:
        return None
    named = [*entry.named_parameters(), *entry.named_buffers()]
    return type(entry), tuple((name, tensor.ndim) for name, tensor in named)
