"""What is to be known of the names under which a model holds its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Held:
    """`ties`: for each name, the first one of the same tensor. `kin`: for what is in an entry of a list or dict of modules, or is one,
    its name without the entry, which its like in other entries share."""

    ties: Mapping[str, str] = field(default_factory=dict)
    kin: Mapping[str, str] = field(default_factory=dict)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that the modules of `model` hold by name, tied ones under every name."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def tensor_named(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer that a module of `model` holds under a name; None where there is none."""
    *path, last = name.split(".")
    module: nn.Module | None = model
    for key in path:
        module = module._modules.get(key) if module is not None else None
    if module is None:
        return None
    return module._parameters.get(last) if last in module._parameters else module._buffers.get(last)


def held_by(model: nn.Module) -> Held:
    """The names of what `model` holds."""
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(tensor), name) for name, tensor in tensors_of(model).items()}
    lists = frozenset(path for path, module in model.named_modules() if isinstance(module, _LISTS))
    kin = {name: _without_entries(name, lists) for name in ties} if lists else {}
    return Held(ties, {name: key for name, key in kin.items() if key != name})


def _without_entries(name: str, lists: frozenset[str]) -> str:
    parts = name.split(".")
    shown = ["#" if ".".join(parts[:position]) in lists else part for position, part in enumerate(parts)]
    return ".".join(shown)
