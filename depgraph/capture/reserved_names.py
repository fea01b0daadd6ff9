"""Names that a torch.fx.GraphModule has for itself: a model's part of such a name goes under another one there.

torch.export has no module of a model whose part is called `code`, `graph` or `meta`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind
from torch.fx import Graph, GraphModule


class Apart:
    """The names under which a GraphModule holds tensors, and back: of their paths, the first part differs where it must."""

    def __init__(self, targets: Iterable[str]) -> None:
        firsts = {target.partition(".")[0] for target in targets}
        self._theirs: dict[str, str] = {}
        for first in sorted(firsts & _taken()):
            name = f"{first}_of_model"
            while name in firsts | _taken():
                name += "_"
            self._theirs[first] = name
        self._ours = {name: first for first, name in self._theirs.items()}

    def __bool__(self) -> bool:
        return bool(self._theirs)

    def there(self, target: str) -> str:
        """The name in the GraphModule of what the model calls `target`."""
        return _renamed(target, self._theirs)

    def here(self, name: str) -> str:
        """The model's name of what the GraphModule calls `name`."""
        return _renamed(name, self._ours)


def apart_in(signature: ExportGraphSignature) -> Apart:
    """The names of all tensors of a captured program in its GraphModule."""
    return Apart(spec.target for spec in signature.input_specs if spec.target)


def module_apart(exported: ExportedProgram) -> GraphModule:
    """`exported.module()` without guards, with names that a GraphModule doesn't have for itself."""
    names = apart_in(exported.graph_signature)
    if not names:
        return exported.module(check_guards=False)
    renamed = copy.copy(exported)
    signature = exported.graph_signature
    renamed._graph_signature = ExportGraphSignature(
        [_spec(spec, names) for spec in signature.input_specs], [_spec(spec, names) for spec in signature.output_specs]
    )
    renamed._state_dict = _keys(exported.state_dict, names)
    renamed._constants = _keys(exported.constants, names)
    return renamed.module(check_guards=False)


@cache
def _taken() -> frozenset[str]:
    empty = GraphModule(nn.Module(), Graph())
    by_export = {"_in_spec", "_out_spec", "shape_env", "validate_inputs"}
    return frozenset({*dir(empty), *by_export} - set(dir(nn.Module())))


def _renamed(target: str, names: Mapping[str, str]) -> str:
    first, dot, rest = target.partition(".")
    return names.get(first, first) + dot + rest


def _spec(spec: Any, names: Apart) -> Any:
    of_state = spec.target and spec.kind is not OutputKind.USER_INPUT_MUTATION
    return replace(spec, target=names.there(spec.target)) if of_state else spec


def _keys(tensors: Mapping[str, Any], names: Apart) -> dict[str, Any]:
    return {names.there(name): tensor for name, tensor in tensors.items()}
