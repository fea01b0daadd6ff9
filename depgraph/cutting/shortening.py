"""Leaving branches and blocks out of a module: blocks leave their containers, other branches make way for nothing.

All is done to the model that is given, and recorded as data, so that the same can be done to a fresh model when a checkpoint
is loaded. The check compares the shorter model with the captured program without those nodes (`bypassing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from depgraph.capture.recording import assign
from depgraph.capture.sizes import Attr
from depgraph.cutting.attending import attending
from depgraph.cutting.bypassing import left_out
from depgraph.cutting.counting import Following, computed_from, counts, kinds_of_entries, moved
from depgraph.cutting.descriptors import follow
from depgraph.cutting.entries import (
    as_json,
    contents,
    leave,
    positions,
    renumber,
    seats,
    uncounted,
    without,
)
from depgraph.cutting.hook_weights import plain_copy
from depgraph.cutting.module import replace_tensors, without_indices
from depgraph.cutting.owning import own
from depgraph.cutting.parting import read_by_others
from depgraph.cutting.passing import Layout, Passed, blank_like, passed
from depgraph.cutting.record import attr_of
from depgraph.cutting.sublayers import passed_of
from depgraph.cutting.ways import look, put
from depgraph.errors import CutError, PlanError
from depgraph.paths import is_in

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Undo = Callable[[], None]


@dataclass
class Shortening:
    """What is done to a model, in this order; JSON-able by `to_json`.

    passed: modules that are replaced, with the layout of what they return; of these `counting` keep the count
    in their place of a cache.
    integers and lists: what follows. entries: those that leave, by container, the last first. narrowed: tensors, their dims and the
    indices that go. keyed: by container, rows of names: those of its entries that have one of a row have its first ones afterwards
    (None: all names are one row). blank: parameters of modules that
    stay, which only what goes reads. fields: other values of a config that follow.
    """

    passed: dict[str, Layout] = field(default_factory=dict)
    counting: dict[str, int] = field(default_factory=dict)
    integers: dict[Attr, int] = field(default_factory=dict)
    lists: list[tuple[Attr, int]] = field(default_factory=list)
    entries: list[tuple[str, int]] = field(default_factory=list)
    narrowed: list[tuple[str, int, list[int]]] = field(default_factory=list)
    keyed: dict[str, list[list[str]] | None] = field(default_factory=dict)
    blank: list[str] = field(default_factory=list)
    fields: dict[Attr, Any] = field(default_factory=dict)

    def to_json(self, model: nn.Module) -> dict[str, Any]:
        """As data; `model` says what integers are before."""
        return {
            "passed": self.passed,
            "counting": self.counting,
            "attributes": [
                {"module": a.module, "name": a.name, "keys": list(a.keys), "before": _now(model, a), "after": value}
                for a, value in self.integers.items()
            ],
            "lists": [
                {"module": a.module, "name": a.name, "keys": list(a.keys), "index": k, "before": _plain(_now(model, a))}
                for a, k in self.lists
            ],
            "entries": [[container, index] for container, index in self.entries],
            "narrowed": [[target, dim, indices] for target, dim, indices in self.narrowed],
            "keyed": self.keyed,
            "blank": list(self.blank),
            "fields": [
                {"module": a.module, "name": a.name, "keys": list(a.keys), "before": _now(model, a), "after": value}
                for a, value in self.fields.items()
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Shortening:
        """From data that `to_json` made."""
        return cls(
            dict(data["passed"]),
            dict(data.get("counting", {})),
            {attr_of(change): change["after"] for change in data["attributes"]},
            [(attr_of(entry), entry["index"]) for entry in data["lists"]],
            [(container, index) for container, index in data["entries"]],
            [(target, dim, indices) for target, dim, indices in data.get("narrowed", ())],
            _rows(data.get("keyed", {})),
            list(data.get("blank", ())),
            {attr_of(change): change["after"] for change in data.get("fields", ())},
        )


def _rows(keyed: Any) -> dict[str, list[list[str]] | None]:
    """Rows of names by container; earlier records have one row each, or only the containers."""
    found: dict[str, Any] = dict.fromkeys(keyed) if isinstance(keyed, list) else keyed
    return {path: [rows] if rows and isinstance(rows[0], str) else rows for path, rows in found.items()}


def _plain(items: Iterable[Any]) -> list[Any] | None:
    """The items of a list, if they can be written as JSON."""
    return list(items) if as_json(list(items)) else None


def _now(model: nn.Module, attr: Attr) -> Any:
    return look(getattr(model.get_submodule(attr.module), attr.name), attr.keys)


def shortening_of(graph: DependencyGraph, wanted: Iterable[str]) -> Shortening:
    """What must be done to leave branches and blocks of these names, one of the `parting.ways`, out of the graph's model.

    Raises:
        PlanError: there is no such branch or block.
        CutError: the branch is no module's alone, so that the class's code would go on computing it; or the model is a graph
            form, whose code calls no modules.
    """
    if isinstance(graph.model, GraphModule):
        raise CutError(f"{graph.name} is a graph form, and what it leaves out goes from its graph: use form='graph'")
    blocks = {block.name: block for block in graph.blocks}
    branches = {branch.name: branch for branch in graph.branches}
    found = Shortening()
    gone: dict[str, list[int]] = {}
    leaving = [blocks[name] for name in wanted if name in blocks]
    for name in wanted:
        if name not in blocks and name not in branches:
            raise PlanError(
                f"{name!r} can't be left out: {graph.branches_refused.get(name, 'there is no such branch')}"
            )
    for block in leaving:
        gone.setdefault(block.container, []).append(block.index)
    inside = [b for block in leaving for b in block.branches]
    alone = [name for name in wanted if name in branches and name not in inside]
    found.passed, found.blank = passed_of(graph, alone)
    sized = frozenset(graph.sizes.users)
    places = {c: positions(graph.model, c, sized) for c in {b.container for b in blocks.values()}}
    nodes = left_out(graph, wanted).nodes
    for why in filter(None, (read_by_others(graph, block, nodes) for block in leaving)):
        raise CutError(why)
    for container, indices in gone.items():
        _leaving(graph, container, sorted(indices), places[container], found)
    for container in places:
        _seat(graph, container, places[container], gone.get(container, []), found)
    return found


def _leaving(
    graph: DependencyGraph, container: str, indices: list[int], places: dict[tuple[str, str], int], found: Shortening
) -> None:
    sized = frozenset(graph.sizes.users)
    follows: Following = counts(graph.model, container, indices[0], sized)
    for attr, value in follows.integers.items():
        found.integers[attr] = value - (len(indices) - 1)
    for attr, _ in follows.lists:
        found.lists += [(attr, index) for index in reversed(indices)]
    if follows.computed:
        count, *others = follows.computed
        values = computed_from(graph.model.config, count.keys, found.integers[count])
        found.fields |= {attr: values[attr.keys] for attr in others if attr.keys in values}
    found.fields |= {attr: moved(_now(graph.model, attr), indices) for attr in follows.places}
    found.integers |= renumber(graph.model, container, places, indices)
    found.entries += [(container, index) for index in reversed(indices)]


def _seat(
    graph: DependencyGraph, container: str, places: dict[tuple[str, str], int], gone: list[int], found: Shortening
) -> None:
    """Number the entries anew whose part with a position is left out: a cache counts those that use it.

    Where a kind of entry has none left that uses its cache, what stands for the first attention of that kind keeps the count.
    """
    model, modules = graph.model, dict(graph.model.named_modules())
    names = list(modules[container]._modules)
    kinds = [kind for k, kind in enumerate(kinds_of_entries(model, container)) if k not in gone]
    stay = [k for k in range(len(names)) if k not in gone]
    for (path, name), constant in places.items():
        at = [".".join(part for part in (container, names[k], path) if part) for k in stay]
        instead = {k: p for k, whole in enumerate(at) for p in found.passed if is_in(whole, p)}
        if not instead:
            continue
        seated = [place + constant for place in seats(kinds, instead)]
        for k, whole in enumerate(at):
            if k not in instead and name in vars(modules.get(whole, nn.Module())):
                found.integers[Attr(whole, name, ())] = seated[k]
        first = uncounted(kinds, instead)
        found.counting |= {instead[k]: seated[k] for k in first if instead[k] in attending(graph)}


def shorten(model: nn.Module, how: Shortening) -> Undo:
    """Do it to a model; the returned function takes it back. Raises CutError when the model isn't like the one it was made for."""
    undo: list[Undo] = []

    def take_back() -> None:
        for step in reversed(undo):
            step()

    try:
        for path, layout in how.passed.items():
            before = model.get_submodule(path)
            instead = before if isinstance(before, Passed) else passed(before, layout)
            instead.place = how.counting.get(path)
            undo.append(_replace(model, path, instead))
        for name in how.blank:
            undo.append(_blank(model, name))
        own(model, [*how.integers, *how.fields, *(attr for attr, _ in how.lists)], undo)
        for attr, value in (*how.integers.items(), *how.fields.items()):
            undo.append(assign(model, attr, value))
        for attr, index in how.lists:
            undo.append(_drop(model, attr, index))
        for container, index in how.entries:
            undo.append(leave(model, container, index, _names(model, how, container)))
        _narrow(model, how, undo)
    except BaseException as error:
        take_back()
        if isinstance(error, (AttributeError, KeyError, IndexError)):
            raise CutError(
                f"{type(model).__name__} has other modules than the one that the cut was made of: {error}"
            ) from error
        raise
    return take_back


def _names(model: nn.Module, how: Shortening, container: str) -> list[list[str]]:
    rows = how.keyed.get(container, [])
    return [list(contents(model.get_submodule(container)))] if rows is None else rows


def _narrow(model: nn.Module, how: Shortening, undo: list[Undo]) -> None:
    """Narrow the tensors, and let what describes them follow; what takes it back is added to `undo` step by step."""
    if not how.narrowed:
        return
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held, successors, names = dict(named), dict[int, torch.Tensor](), dict[int, set[tuple[int, tuple[int, ...]]]]()
    for target, dim, indices in how.narrowed:
        if target not in held:
            raise AttributeError(f"there is no {target!r}")
        key, what = id(held[target]), (dim, tuple(indices))
        if what not in names.setdefault(key, set()):
            names[key].add(what)
            successors[key] = without_indices(successors.get(key, held[target]), dim, indices)
    replace_tensors(model, successors, undo)
    follow(model, undo)


def _replace(model: nn.Module, path: str, module: nn.Module) -> Undo:
    owner = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    before = owner._modules[name]
    assert before is not None
    module.train(before.training)
    owner._modules[name] = module
    return lambda: owner._modules.__setitem__(name, before)


def _blank(model: nn.Module, name: str) -> Undo:
    """Put nothing in the place of a parameter."""
    path, _, key = name.rpartition(".")
    holder = model.get_submodule(path)
    before = dict(holder._parameters)
    holder.__dict__[key] = blank_like(holder._parameters.pop(key))

    def put_back() -> None:
        del holder.__dict__[key]
        holder._parameters.clear()
        holder._parameters.update(before)

    return put_back


def _drop(model: nn.Module, attr: Attr, index: int) -> Undo:
    holder: Any = model.get_submodule(attr.module)
    return put(holder, (attr.name, *attr.keys), without(_now(model, attr), index))


def shorter_copy(model: nn.Module, how: Shortening) -> nn.Module:
    """A copy with that done to it; what leaves isn't copied."""
    memo: dict[int, Any] = {}
    leaving = [*how.passed]
    for container, index in how.entries:
        name, entry = list(contents(model.get_submodule(container)).items())[index]
        if isinstance(entry, nn.Module):
            leaving.append(f"{container}.{name}" if container else name)
    shared = {id(m) for path, m in model.named_modules() if not any(is_in(path, p) for p in leaving)}
    for path in leaving:
        module = model.get_submodule(path)
        if id(module) not in shared:
            memo[id(module)] = passed(module, how.passed.get(path)).train(module.training)
    fresh = plain_copy(model, memo)
    shorten(fresh, how)
    return fresh


__all__ = ["Shortening", "shorten", "shortening_of", "shorter_copy"]
