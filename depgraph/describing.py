"""Axes in words: what an axis is to the operators that use it, and what stays as it is and why.

The words come from the graph's structure (`layers.Anatomy`), tried in the order of `_ROLES`; the first that fits is taken.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from depgraph.axes import Axis
from depgraph.classes import NONE
from depgraph.layers import Anatomy, Attention, Layer
from depgraph.wording import counted


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
    layers = anatomy.layers
    written, read = (_by_class(anatomy, dims) for dims in ([x.out for x in layers], [x.into for x in layers]))
    uses = (
        _Use(anatomy, axis, *(tuple(layers[k] for k in _reached(axis, side)) for side in (written, read)))
        for axis in anatomy.graph.axes
    )
    return {use.axis.name: next(found for role in _ROLES if (found := role(use))) for use in uses}


def common(names: Iterable[str]) -> str:
    """The module that all of the named layers lie in; empty for the whole model."""
    parts = [name.split(".") for name in names]
    return ".".join(os.path.commonprefix(parts))


def _by_class(anatomy: Anatomy, dims: Iterable[int | None]) -> dict[int, list[int]]:
    """The places of dims in their list, by the classes that they are of."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, dim in enumerate(dims):
        if dim is not None:
            found[anatomy.class_of(dim)].append(place)
    return found


def _reached(axis: Axis, places: Mapping[int, list[int]]) -> list[int]:
    """Those of the places that an axis reaches, in their order."""
    return sorted(place for number in axis.labels for place in places.get(number, ()))


def _stream(use: _Use) -> Description | None:
    """A width along which what a branch computed is added to what it was computed from."""
    return None if use.anatomy.streams.isdisjoint(use.axis.labels) else Description("residual stream", "", _shared(use))


def _shared(use: _Use) -> str:
    layers = (*use.writers, *use.readers)
    begin = f"from {layers[0].name} on, " if layers else ""
    word = "channels" if 2 * sum(layer.convolves for layer in layers) > len(layers) else "hidden width"
    shared = f"{word} {begin}shared by {len({layer.name for layer in layers})} layers"
    return _remarks(shared, _at_a_time(use, layers[:1]))


def _tried(use: _Use) -> Description | None:
    """What goes with the outputs of a router as a trial showed: whole modules of a list, or slices of stacked weights."""
    if not use.axis.tried:
        return None
    relations, reached = use.anatomy.program.relations, use.axis.labels.keys()
    counts = [least.count for least in relations.least if use.anatomy.class_of(least.dim) in reached]
    made = [groups for layer in use.writers if layer.out is not None and (groups := use.labels(layer.out)) is not None]
    known = [entries.labels[entries.labels != NONE] for entries in use.axis.entries]
    owners = [entries.container for entries in use.axis.entries]
    owners = owners or [member.target.rpartition(".")[0] for member in use.axis.members]
    role, note = _kind_of_choices("experts", next(iter((*known, *made)), None), max(counts, default=0))
    return Description(role, common(owners), note)


def _chosen(use: _Use) -> Description | None:
    """What a router chooses among: its outputs, and stacked weights or rows of a table that they stand for."""
    relations, reached = use.anatomy.program.relations, use.axis.labels.keys()
    counts = [least.count for least in relations.least if use.anatomy.class_of(least.dim) in reached]
    if not counts:
        return None
    held = {y: d for y in use.anatomy.layers for d in y.places if use.anatomy.class_of(d) in reached}
    if not held:
        return None
    noun = "experts" if any(layer.beside for layer in held) else "entries"
    role, note = _kind_of_choices(noun, use.labels(next(iter(held.values()))), max(counts))
    return Description(role, common(layer.name for layer in (*use.writers, *held)), note)


def _kind_of_choices(noun: str, groups: np.ndarray | None, count: int) -> tuple[str, str]:
    share = _share(groups)
    if groups is None or share == 1:
        return noun, f"{count} chosen at a time" if count else ""
    return (f"groups of {noun}", f"{share} each") if (np.diff(groups) >= 0).all() else (f"{noun} of every group", "")


def _heads(use: _Use) -> Description | None:
    sites = [
        (a, dim, groups) for a in use.anatomy.attentions for dim in a.lead if (groups := _groups(use, dim)) is not None
    ]
    if not sites:
        return None
    role, note = _kind_of_heads(use, *sites[0])
    return _of_attentions(role, [attention for attention, _, _ in sites], note)


def _kind_of_heads(use: _Use, attention: Attention, dim: int, groups: np.ndarray) -> tuple[str, str]:
    """The words for a set of heads, and a remark: by how the groups lie along the dim, and whether keys have them."""
    share, in_order = _share(groups), bool((np.diff(groups) >= 0).all())
    reaches_keys = any(layer.target in attention.keys for layer in use.writers)
    crossed = share > 1 and not in_order and len(use.anatomy.graph.widths.axes_of(dim)) > 1
    if crossed or (attention.keys and not reaches_keys):
        return "query heads per KV head" if share > 1 else "query heads that share one KV head", ""
    return ("KV heads", f"with {share} query heads each") if in_order and share > 1 else ("attention heads", "")


def _head_width(use: _Use) -> Description | None:
    scored = [(a, groups) for a in use.anatomy.attentions if (groups := _groups(use, a.width)) is not None]
    carried = [a for a in use.anatomy.attentions if _groups(use, a.values) is not None]
    attentions = [*(a for a, _ in scored), *carried]
    if not attentions:
        return None
    if not scored:
        return _of_attentions("head width of the values", attentions)
    share = _share(scored[0][1])
    if share == 2 and use.anatomy.turned & use.axis.labels.keys():
        return _of_attentions("rotary pairs of queries and keys", attentions)
    role = "head width of queries, keys and values" if carried else "head width of queries and keys"
    return _of_attentions(role, attentions, _times(share))


def _of_attentions(role: str, attentions: list[Attention], note: str = "") -> Description:
    modules = list(dict.fromkeys(attention.module for attention in attentions))
    several = f"the same in {len(modules)} attentions" if len(modules) > 1 else ""
    return Description(role, common(modules), _remarks(note, several))


def _groups(use: _Use, dim: int) -> np.ndarray | None:
    """The groups along a dim that is wider than one, where the axis reaches it."""
    return use.labels(dim) if use.anatomy.size(dim) > 1 else None


def _share(groups: np.ndarray | None) -> int:
    """How many indices of a dim go with one group."""
    return 1 if groups is None else len(groups) // max(len(np.unique(groups)), 1)


def _times(share: int) -> str:
    return f"{share} at a time" if share > 1 else ""


def _remarks(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _hidden(use: _Use) -> Description | None:
    """The units of recurrent layers, which make them and read them again, unless they are projected in between."""
    made = [layer for layer in use.writers if layer.recurs]
    read = [layer for layer in use.readers if layer.recurs]
    if not made:
        return None
    modules = list(dict.fromkeys(layer.target.rpartition(".")[0] for layer in made))
    several = f"shared by {len(modules)} recurrent modules" if len(modules) > 1 else ""
    if set(made) & set(read):
        return Description("hidden units", common(modules), several)
    role = "units of the memory, before their projection," if len(made) > len(read) else "projected states"
    return Description(role, common(modules), several)


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
        return Description(noun, parents.pop(), _remarks(f"made by {len(full)} layers", _at_a_time(use, full)))
    more = f"and of {counted(len(full) - 1, 'more layer', 'more layers')}" if len(full) > 1 else ""
    return Description(noun, full[0].name, _remarks(more, _at_a_time(use, full)))


def _at_a_time(use: _Use, layers: Sequence[Layer]) -> str:
    out = layers[0].out if layers else None
    return _times(_share(use.labels(out)) if out is not None else 1)


def _read(use: _Use) -> Description | None:
    if not use.readers:
        return None
    return Description("inputs", common(layer.name for layer in use.readers) or use.readers[0].name)


def _held(use: _Use) -> Description:
    member = next((m for m in use.axis.members if m.kind == "parameter"), use.axis.members[0])
    return Description(f"dimension {member.dim}", member.target)


_ROLES: tuple[Callable[[_Use], Description | None], ...] = (
    _tried,
    _stream,
    _chosen,
    _heads,
    _head_width,
    _hidden,
    _grouped,
    _made,
    _read,
    _held,
)
