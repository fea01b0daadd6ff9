"""What the operators of a captured graph are called, what they are given by name, and whether they write."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node


@lru_cache(maxsize=4096)
def operator_name(target: Any) -> str:
    """The name of an ATen operator without its overload; empty for anything else."""
    return getattr(getattr(target, "_overloadpacket", None), "__name__", "")


def aten_name(node: Node) -> str:
    """The same without the mark of an operator in place; "getitem"; empty for others."""
    return "getitem" if node.target is operator.getitem else operator_name(node.target).rstrip("_")


def without_overload(target: Any) -> str:
    """`aten.add` for aten.add.Tensor."""
    return ".".join(str(target).split(".")[:2])


def argument(node: Node, wanted: str, otherwise: Any = None) -> Any:
    """An argument by its schema name; `otherwise` where the operator isn't given it."""
    k = _places(node.target).get(wanted, len(node.args))
    return node.args[k] if k < len(node.args) else node.kwargs.get(wanted, otherwise)


@lru_cache(maxsize=4096)
def _places(target: Any) -> dict[str, int]:
    """The place of each argument in an operator's schema."""
    schema = getattr(target, "_schema", None)
    return {} if schema is None else {argument.name: k for k, argument in enumerate(schema.arguments)}


@lru_cache(maxsize=4096)
def is_pointwise(target: Any) -> bool:
    """Does torch say that an operator, or what one in place is the same as, computes each number by itself?"""
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return True
    name, overload = operator_name(target), getattr(target, "_overloadname", "")
    known = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") and len(name) > 1 else None
    return known is not None and overload in known.overloads() and is_pointwise(getattr(known, overload))


def writes(node: Node) -> bool:
    """Does an operator change a tensor that it is given?"""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def by_name(node: Node) -> dict[str, Any]:
    """The arguments of a captured operator by schema name, defaults filled in."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    return {one.name: argument(node, one.name, one.default_value) for one in declared}


@dataclass(frozen=True)
class Named:
    """An operator of torch's by its path below torch.ops: operators themselves can't be pickled."""

    path: tuple[str, ...]


def named(target: Any) -> Any:
    """An operator by its name; anything else as it is."""
    if isinstance(target, torch._ops.OpOverload):
        return Named((*target._schema.name.split("::"), target._overloadname))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return Named(("higher_order", target.__name__))
    return target


def operator_of(given: Any) -> Any:
    """What `named` was given."""
    return operator.attrgetter(".".join(given.path))(torch.ops) if isinstance(given, Named) else given
