"""An entry leaves its container, and what says its position follows.

What follows isn't known by name. An integer that is the position of its entry, up to a constant, in every entry of the
container (a cache's layer index), is numbered anew. What counts the entries is in `counting`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from depgraph.capture.sizes import Attr

Undo = Callable[[], None]
_DEPTH = 3
_NUMBER = re.compile(r"\d+")


def contents(holder: nn.Module) -> dict[str, nn.Module | nn.Parameter | None]:
    """What a module holds by name, any of which may be an entry: its children, then its own parameters."""
    return {**holder._modules, **holder._parameters}


def leave(model: nn.Module, container: str, index: int, names: Sequence[Sequence[str]] = ()) -> Undo:
    """Take an entry out of a container; the others move up. The returned function takes it back.

    In a list they are numbered anew. Elsewhere those that have one of a row of `names` have the first of these afterwards;
    others keep theirs.
    """
    holder = model.get_submodule(container)
    before = dict(holder._modules), dict(holder._parameters)
    gone = list(contents(holder))[index]
    kept = [name for name in contents(holder) if name != gone]
    rows = [(kept, list(map(str, range(len(kept)))))] if in_order(holder) else [_those_of(kept, row) for row in names]
    moved = {old: new for olds, news in rows for old, new in zip(olds, news, strict=False)}
    modules, parameters = ({moved.get(n, n): held for n, held in store.items() if n != gone} for store in before)
    _refill(holder, modules, parameters)
    return lambda: _refill(holder, *before)


def _those_of(kept: list[str], row: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    return [name for name in kept if name in row], row


def in_order(holder: nn.Module) -> bool:
    """Are its entries named by their position?"""
    return isinstance(holder, (nn.ModuleList, nn.Sequential, nn.ParameterList))


def is_container(holder: nn.Module) -> bool:
    """Is it a list or dict of modules or parameters, and nothing else?"""
    return isinstance(holder, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))


def kinds(holder: nn.Module) -> dict[str, Any]:
    """What each child, or parameter, of a module is like, by name: its class, and the tensors it holds, of any size, as cuts
    may narrow some.

    Where these aren't in order, also its name without the number in it, if it has one. Those without tensors are left out, and
    where they aren't entries, those without a number.
    """
    found: dict[str, Any] = {}
    entries, unnamed = is_container(holder) or in_order(holder), in_order(holder)
    for name, one in contents(holder).items():
        if not entries and not _NUMBER.search(name):
            continue
        held = tuple((n, t.ndim) for n, t in _tensors(one))
        if held:
            numbered = not unnamed and _NUMBER.search(name)
            found[name] = type(one), held, _NUMBER.sub("", name) if numbered else ""
    return found


def _tensors(one: nn.Module | nn.Parameter | None) -> list[tuple[str, torch.Tensor]]:
    if isinstance(one, nn.Module):
        return [*one.named_parameters(), *one.named_buffers()]
    return [] if one is None else [("", one)]


def _refill(holder: nn.Module, modules: dict[str, Any], parameters: dict[str, Any]) -> None:
    for store, held in ((holder._modules, modules), (holder._parameters, parameters)):
        store.clear()
        store.update(held)
    if isinstance(holder, nn.ParameterList):  # these two count by themselves what they hold
        holder._size = len(parameters)
    if isinstance(holder, nn.ParameterDict):
        holder._keys = dict.fromkeys(parameters)


def positions(model: nn.Module, container: str, sized: frozenset[Attr]) -> dict[tuple[str, str], int]:
    """The integers that are an entry's position plus a constant, by module within the entry and name, and the constant.

    Integers in `sized`, that operators are given, are none.
    """
    holder = model.get_submodule(container)
    entries = list(holder.children())
    given = {(a.module, a.name) for a in sized}
    found: dict[tuple[str, str], dict[int, int]] = {}
    for k, (key, entry) in enumerate(zip(holder._modules, entries, strict=True)):
        for path, module in entry.named_modules():
            whole = ".".join(part for part in (container, key, path) if part)
            integers = {name: value for name, value in vars(module).items() if type(value) is int}
            for name in [name for name in integers if (whole, name) not in given]:
                found.setdefault((path, name), {})[k] = integers[name]
    return {
        place: next(iter(values.values())) - next(iter(values))
        for place, values in found.items()
        if len(values) > 1 and len({value - k for k, value in values.items()}) == 1
    }


def renumber(
    model: nn.Module, container: str, places: dict[tuple[str, str], int], gone: Iterable[int]
) -> dict[Attr, int]:
    """New values of the integers at `places` of each entry that stays, when entries `gone` (by their old position) leave."""
    left, new = set(gone), dict[Attr, int]()
    entries = list(model.get_submodule(container).named_children())
    for (path, name), constant in places.items():
        place = 0
        for k, (key, entry) in enumerate(entries):
            if k in left:
                continue
            if name in vars(dict(entry.named_modules()).get(path, nn.Module())):
                whole = ".".join(part for part in (container, key, path) if part)
                new[Attr(whole, name, ())] = place + constant
            place += 1
    return new


def seats(kinds: list[Any], out: Iterable[int]) -> list[int]:
    """A place for each of some entries of these kinds, of which `out` don't use theirs.

    A cache has places of the entries' kinds, and asks the first or the last of a kind what it holds: so those that use theirs
    have, in their order, the first and the last of their kind and those next to the first.
    """
    unused, found = set(out), [0] * len(kinds)
    for kind in dict.fromkeys(kinds):
        places = [k for k, other in enumerate(kinds) if other == kind]
        using = [k for k in places if k not in unused]
        last = places[-1:] if len(using) > 1 else []
        taken = places[: len(using) - len(last)] + last
        left = [k for k in places if k not in taken]
        for k, place in [*zip(using, taken, strict=True), *zip(sorted(unused & set(places)), left, strict=True)]:
            found[k] = place
    return found


def uncounted(kinds: list[Any], out: Iterable[int]) -> list[int]:
    """The first of the entries of each kind of which all are `out`."""
    unused = set(out)
    return [
        kinds.index(kind) for kind in dict.fromkeys(kinds) if all(k in unused for k, o in enumerate(kinds) if o == kind)
    ]


def without(values: Any, index: int) -> Any:
    """A list or tuple without one item."""
    return type(values)(item for k, item in enumerate(values) if k != index)


def as_json(value: Any) -> bool:
    """Can it be written as JSON?"""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
