"""The modules of a model, as far as blocks ask for them: entries of containers, and which are alike."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from torch import nn
from torch.fx import GraphModule, Node

from depgraph.capture.origins import classes_of, entries_of

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class Modules:
    """The modules of a model, or those that a graph form comes from, as the nodes of its capture remember them."""

    def __init__(self, model: nn.Module, nodes: Iterable[Node]) -> None:
        self.model = model
        self.nodes = tuple(nodes) if isinstance(model, GraphModule) else ()

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """Paths of the modules that are entries of a container, in the order in which these hold them."""
        if isinstance(self.model, GraphModule):
            return entries_of(self.nodes)
        held = ((path, module) for path, module in self.model.named_modules() if isinstance(module, _CONTAINERS))
        return tuple(f"{path}.{name}" if path else name for path, module in held for name, _ in module.named_children())

    def likeness(self, path: str) -> tuple[object, ...]:
        """What a module is like: its class, and the names of its parameters with how many dims they have, as cuts change sizes."""
        parts = path.split(".")
        module: nn.Module | None = self.model
        while parts and module is not None:
            module = module._modules.get(parts.pop(0))
        held = () if module is None else module.named_parameters(remove_duplicate=False)
        return self._classes.get(path, type(module)), *((name, p.dim()) for name, p in held)

    @cached_property
    def _classes(self) -> dict[str, str]:
        return classes_of(self.nodes)
