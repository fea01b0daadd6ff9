"""Axes in words: what an axis is to the operators that use it, and what stays as it is and why.

The words come from the graph's structure (`layers.Anatomy`), tried in the order of `_ROLES`; the first that fits is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from depgraph.axes import Axis
from depgraph.coupling import NONE
from depgraph.layers import Anatomy, Attention, Layer


@dataclass(frozen=True)
class Description:
    """What an axis is: its role, the module or layer that has it, and a remark such as `2 query heads each`."""

    role: str
    where: str = ""
    note: str = ""

    def __str__(self) -> str:
        within = f" {'in' if ' of ' in self.role else 'of'} {self.where}" if self.where else ""
        return f"{self.role}{within}{f', {self.note}' if self.note else ''}"


@dataclass(frozen=True)
class _Use:
    """An axis, the layers that write it and read it (whose output or input dim it reaches)."""

    anatomy: Anatomy
    axis: Axis
    writers: tuple[Layer, ...]
    readers: tuple[Layer, ...]

    def labels(self, dim: int) -> np.ndarray | None:
        """The groups of the axis along a dim, where it reaches that."""
        found = self.axis.labels.get(self.anatomy.class_of(dim))
        return None if found is None else found[found != NONE]


def describe(anatomy: Anatomy) -> dict[str, Description]:
    """What every axis of a graph is, by its name."""
    uses = (_use(anatomy, axis) for axis in anatomy.graph.axes)
    return {use.axis.name: next(found for role in _ROLES if (found := role(use))) for use in uses}


def common(names: Iterable[str]) -> str:
    """The module that all of the named layers lie in; empty for the whole model."""
    parts = [name.split(".") for name in names]
    return ".".join(os.path.commonprefix(parts))


def _use(anatomy: Anatomy, axis: Axis) -> _Use:
    def reached(dim: int | None) -> bool:
        return dim is not None and anatomy.class_of(dim) in axis.labels

    writers = tuple(layer for layer in anatomy.layers if reached(layer.out))
    return _Use(anatomy, axis, writers, tuple(layer for layer in anatomy.layers if reached(layer.into)))


def _stream(use: _Use) -> Description | None:
    """A width along which what a branch computed is added to what it was computed from."""
    return None if use.anatomy.streams.isdisjoint(use.axis.labels) else Description("residual stream", "", _shared(use))


def _shared(use: _Use) -> str:
    layers = (*use.writers, *use.readers)
    begin = f"from {layers[0].name} on, " if layers else ""
    word = "channels" if 2 * sum(layer.convolves for layer in layers) > len(layers) else "hidden width"
    return f"{word} {begin}shared by {len({layer.name for layer in layers})} layers"


def _heads(use: _Use) -> Description | None:
    for attention in use.anatomy.attentions:
        for dim in attention.lead:
            groups = use.labels(dim) if use.anatomy.size(dim) > 1 else None
            if groups is not None:
                return Description(*_kind_of_heads(use, attention, groups))
    return None


def _kind_of_heads(use: _Use, attention: Attention, groups: np.ndarray) -> tuple[str, str, str]:
    where, share = attention.module, len(groups) // max(len(np.unique(groups)), 1)
    reaches_keys = any(layer.target in attention.keys for layer in use.writers)
    in_order = bool((np.diff(groups) >= 0).all())
    if not reaches_keys and attention.keys:
        return ("query heads per KV head" if share > 1 else "query heads that share one KV head"), where, ""
    if in_order and share > 1:
        return "KV heads", where, f"with {share} query heads each"
    return "attention heads", where, ""


def _head_width(use: _Use) -> Description | None:
    sites = [(a, a.width, a.values) for a in use.anatomy.attentions]
    found = [(a, use.labels(width), use.labels(values)) for a, width, values in sites]
    scored = [(a, groups) for a, groups, _ in found if groups is not None]
    carried = [a for a, _, values in found if values is not None]
    if not scored and not carried:
        return None
    modules = list(dict.fromkeys(a.module for a in (*(a for a, _ in scored), *carried)))
    where, note = common(modules), f"the same in {len(modules)} attentions" if len(modules) > 1 else ""
    if not scored:
        return Description("head width of the values", where, note)
    groups = scored[0][1]
    if len(groups) == 2 * len(np.unique(groups)) and use.anatomy.turned & use.axis.labels.keys():
        return Description("rotary pairs of queries and keys", where, note)
    return Description(
        "head width of queries, keys and values" if carried else "head width of queries and keys", where, note
    )


def _grouped(use: _Use) -> Description | None:
    """The groups of a grouped convolution, or the channels in each of its groups."""
    sides = [(layer, layer.out, "output") for layer in use.writers] + [(y, y.into, "input") for y in use.readers]
    for layer, dim, side in sides:
        groups = use.labels(dim) if dim is not None and layer.groups > 1 else None
        if groups is None or layer.groups == use.anatomy.size(layer.into or 0):
            continue
        if use.axis.size == layer.groups and (np.diff(groups) >= 0).all():
            note = f"{len(groups) // layer.groups} channels each"
            return Description("groups of the grouped convolution", layer.name, note)
        return Description(f"{side} channels of every group", layer.name, "a grouped convolution")
    return None


def _made(use: _Use) -> Description | None:
    """The outputs of one layer, or of layers whose results are multiplied, added, joined or gated."""
    full = [layer for layer in use.writers if layer.groups == 1] or list(use.writers)
    if not full:
        return None
    noun = "channels" if full[0].convolves else "neurons"
    noun = "embedding width" if all("embedding" in layer.op for layer in full) else noun
    parents = {layer.name.rpartition(".")[0] for layer in full}
    if len(full) > 1 and len(parents) == 1 and "" not in parents:
        return Description(noun, parents.pop(), f"made by {len(full)} layers")
    more = f"and of {len(full) - 1} more layer{'s'[: len(full) - 2]}" if len(full) > 1 else _at_a_time(use, full[0])
    return Description(noun, full[0].name, more)


def _at_a_time(use: _Use, layer: Layer) -> str:
    groups = use.labels(layer.out) if layer.out is not None else None
    share = 1 if groups is None else len(groups) // max(len(np.unique(groups)), 1)
    return f"{share} at a time" if share > 1 else ""


def _read(use: _Use) -> Description | None:
    if not use.readers:
        return None
    return Description("inputs", common(layer.name for layer in use.readers) or use.readers[0].name)


def _held(use: _Use) -> Description:
    member = next((m for m in use.axis.members if m.kind == "parameter"), use.axis.members[0])
    return Description(f"dimension {member.dim}", member.target)


_ROLES: tuple[Callable[[_Use], Description | None], ...] = (
    _stream,
    _heads,
    _head_width,
    _grouped,
    _made,
    _read,
    _held,
)
