"""The modules that a file was exported from, as far as its names tell: paths, and which of them stand in one container."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

from depgraph.onnx_door.naming import module_of
from depgraph.paths import around

if TYPE_CHECKING:
    from depgraph.onnx_door.lowering import Lowered


class Modules:
    """Paths of modules by what lies in them; a file without such names has none."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.kinds: dict[str, set[str]] = defaultdict(set)
        self.shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
        self.owners: dict[str, str] = {}
        for node in lowered.operators.values():
            for path in around(module_of(node))[1:]:
                self.kinds[path].add(node.op_type)
        for name in lowered.held:
            self._place(name)

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """Modules whose name is a number, and that aren't alone with that in what holds them, in the order of execution."""
        numbered = [path for path in self.kinds if path.rpartition(".")[2].isdigit()]
        beside: dict[str, int] = defaultdict(int)
        for path in numbered:
            beside[path.rpartition(".")[0]] += 1
        return tuple(path for path in numbered if beside[path.rpartition(".")[0]] > 1)

    def likeness(self, path: str) -> tuple[object, ...]:
        """What a module is like: the kinds of its operators, and what it holds with how many dims that has, as cuts change sizes."""
        return (frozenset(self.kinds[path]), *sorted((name, len(shape)) for name, shape in self.shapes[path]))

    def owner(self, name: str) -> str:
        """The module that a stored tensor is of: by its own name, or by that of the operator that reads it."""
        return self.owners.get(name, "")

    def _place(self, name: str) -> None:
        value, made = self.lowered.held[name], self.lowered.program.values[name]
        own = name.rpartition(".")[0]
        readers = [module_of(node) for node, _ in value.uses()]
        owner = own if own in self.kinds or not readers else readers[0]
        self.owners[name] = owner
        for path in around(owner)[1:]:
            self.shapes[path].append((name.removeprefix(f"{path}."), made.shape) if own == owner else ("", made.shape))
