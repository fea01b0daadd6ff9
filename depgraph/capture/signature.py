"""Names of the inputs of a directly captured graph, and its signature, as torch.export would give them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from depgraph.offloading import computed_on

_ODD = re.compile(r"[^a-zA-Z0-9]")


class Names:
    """What the parameters, buffers, constants and inputs of one model are called in its graph."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
        self.away = computed_on(model)
        self.on_meta = any(tensor.is_meta and id(tensor) not in self.away for _, tensor in self.held())
        self.constants: dict[str, Any] = {}
        self._taken: set[str] = set()
        self._lifted = 0

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """A name for the placeholder of every parameter and then every buffer."""
        for prefix, named in (("p_", self.model.named_parameters), ("b_", self.model.named_buffers)):
            for name, tensor in named(remove_duplicate=False):
                yield prefix + _ODD.sub("_", name).lower(), tensor

    def free(self, name: str) -> str:
        """`name`, with a number where it is taken."""
        name = _ODD.sub("_", name)
        found, number = name, 0
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        self._taken.add(found)
        return found

    def constant(self, tensor: Tensor, module: str) -> str:
        """The name of a tensor that the code holds elsewhere: its attribute's, or that of a constant of `module`."""
        target = self._attribute(tensor)
        if target is None:
            target = f"{module}.lifted_tensor_{self._lifted}".lstrip(".")
            self._lifted += 1
        self.constants[target] = tensor
        return target

    def _attribute(self, tensor: Tensor) -> str | None:
        for path, module in self.model.named_modules():
            for name, held in vars(module).items():
                if held is tensor:
                    return f"{path}.{name}".lstrip(".")
        return None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """A name for every leaf of the inputs: the argument's, and the way to it within the argument."""
        bound = {**inspect.signature(self.model.forward).bind_partial(*args).arguments, **kwargs}
        ways, _ = pytree.tree_flatten_with_path(bound)
        return ["_".join(_key(key).lower() for key in way) for way, _ in ways]


def _key(key: Any) -> str:
    """One step of the way to a leaf: a key of a dict, a position, or the name of an attribute."""
    found = next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key)
    return _ODD.sub("_", str(found))


def signature_of(names: Names, graph: torch.fx.Graph, outputs: list[Any]) -> ExportGraphSignature:
    """The signature of a graph whose placeholders are parameters, buffers, constants and inputs, in this order."""
    kinds = [(InputKind.PARAMETER, name) for name in names.parameters]
    kinds += [(InputKind.BUFFER, name) for name in names.buffers]
    kinds += [(InputKind.CONSTANT_TENSOR, name) for name in names.constants]
    saved = names.model.state_dict().keys()
    inputs = []
    for position, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        kind, target = kinds[position] if position < len(kinds) else (InputKind.USER_INPUT, None)
        persistent = target in saved if kind is InputKind.BUFFER else None
        inputs.append(InputSpec(kind, _argument(node.meta["val"], node.name), target, persistent))
    found = [_argument(o.meta["val"], o.name) if isinstance(o, torch.fx.Node) else _argument(o, "") for o in outputs]
    return ExportGraphSignature(inputs, [OutputSpec(OutputKind.USER_OUTPUT, argument, None) for argument in found])


def _argument(value: Any, name: str) -> TensorArgument | ConstantArgument:
    return TensorArgument(name=name) if isinstance(value, Tensor) else ConstantArgument(name=name, value=value)
