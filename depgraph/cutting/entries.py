"""An entry leaves its container, and what counts the entries follows.

What follows isn't known by name. An integer that is the position of its entry, up to a constant, in every entry of the
container (a cache's layer index), is numbered anew. A count is an integer that is the number of entries and no tensor's size
comes from it, in the module that holds the container; in the config of a model of transformers, it is one with which the
config builds that many fewer entries, together with lists that have an item for every entry. A model that a config builds shows
which other integers are counts, and lists that the config's class computes from the count, such as names of layers, follow.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from depgraph.capture.sizes import Attr
from depgraph.cutting.building import built
from depgraph.cutting.record import attention_of, library_class
from depgraph.cutting.ways import look, put

Undo = Callable[[], None]
_DEPTH = 3


@dataclass
class Following:
    """What an entry's leaving changes: new integers by attribute, and which item goes from which lists.

    Of `computed` fields of the config its class computes the value, from the count that is the first of these fields.
    """

    integers: dict[Attr, int] = field(default_factory=dict)
    lists: list[tuple[Attr, int]] = field(default_factory=list)
    computed: list[Attr] = field(default_factory=list)


def leave(model: nn.Module, container: str, index: int, keys: str = "own") -> Undo:
    """Take an entry out of a container; the others move up. The returned function takes it back.

    In a dict of modules they keep their "own" keys, or have the "first" of those before.
    """
    holder = model.get_submodule(container)
    before = dict(holder._modules)
    kept = [(name, module) for k, (name, module) in enumerate(before.items()) if k != index]
    if not isinstance(holder, nn.ModuleDict):
        names = [str(k) for k in range(len(kept))]
    else:
        names = [name for name, _ in kept] if keys == "own" else list(before)[: len(kept)]
    _refill(holder, dict(zip(names, (module for _, module in kept), strict=True)))
    return lambda: _refill(holder, before)


def _refill(holder: nn.Module, modules: dict[str, nn.Module | None]) -> None:
    holder._modules.clear()
    holder._modules.update(modules)


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
            for name, value in vars(module).items():
                if type(value) is int and (whole, name) not in given:
                    found.setdefault((path, name), {})[k] = value
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


def kinds_of_entries(model: nn.Module, container: str) -> list[tuple[str, ...]]:
    """The kind of each entry: what lists of words say of it that have one for every entry, in the config or beside the container."""
    number = len(model.get_submodule(container)._modules)
    held = [*vars(model.get_submodule(container.rpartition(".")[0])).values()]
    held += [value for _, value in _walk(model.config, ())] if library_class(model) else []
    lists = [v for v in held if isinstance(v, (list, tuple)) and len(v) == number and all(type(w) is str for w in v)]
    return [tuple(words[k] for words in lists) for k in range(number)]


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


def counts(model: nn.Module, container: str, index: int, sized: frozenset[Attr]) -> Following:
    """What follows when entry `index` leaves `container`; what is in `sized`, or has such in it, are sizes and no counts."""
    number = len(model.get_submodule(container)._modules)
    owner = container.rpartition(".")[0]
    held = vars(model.get_submodule(owner))
    found = Following()
    for name, value in held.items():
        attr = Attr(owner, name, ())
        if type(value) is int and value == number and attr not in sized and not name.startswith("_"):
            found.integers[attr] = number - 1
        plain = not name.startswith("_") and not any((a.module, a.name) == (owner, name) for a in sized)
        if type(value) in (list, tuple) and len(value) == number and plain:
            found.lists.append((attr, index))
    trial = _from_config(model, container, index, found)
    if trial is not None:
        _as_built(vars(trial.get_submodule(owner)), found, number - 1)
    return found


def _as_built(held: dict[str, Any], found: Following, number: int) -> None:
    """Keep of the integers and lists beside a container those that are shorter where it is built with `number` entries."""
    found.integers = {a: value for a, value in found.integers.items() if a.keys or held.get(a.name) == number}
    kept = {a for a, _ in found.lists if a.keys or len(held.get(a.name, ())) == number}
    found.lists = [(a, k) for a, k in found.lists if a in kept]


def _from_config(model: nn.Module, container: str, index: int, found: Following) -> nn.Module | None:
    """Add what of a transformers config builds fewer entries; gives what it builds."""
    if not library_class(model):
        return None
    number = len(model.get_submodule(container)._modules)
    config: Any = model.config
    lists = [keys for keys, value in _walk(config, ()) if isinstance(value, (list, tuple)) and len(value) == number]
    integers = [keys for keys, value in _walk(config, ()) if type(value) is int and value == number]
    for shorter, keys in product(_subsets(lists), [*integers, None]):
        count: dict[tuple[Any, ...], Any] = {} if keys is None else {keys: number - 1}
        computed = computed_from(config, keys, number - 1, shorter) if keys else {}
        for more in [{}, computed] if computed else [{}]:
            trial = _edited(copy.deepcopy(config), count | more, shorter, index)
            shown = _built(model, container, trial, number - 1)
            if shown is not None:
                found.integers.update({Attr("", "config", k): v for k, v in count.items()})
                found.lists += [(Attr("", "config", k), index) for k in shorter]
                found.computed += [Attr("", "config", k) for k in (*count, *more)] if more else []
                return shown
    return None


def computed_from(
    config: Any, keys: tuple[Any, ...], number: int, but: Iterable[Any] = ()
) -> dict[tuple[Any, ...], list[Any]]:
    """Lists of a config that its class computes from a count, by the way to them, where they are as it computes them.

    Their values are those for `number` in place of the count that lies at `keys`; `but` are ways to lists to leave out.
    """
    held, way = look(config, keys[:-1]), keys[:-1]
    try:
        now, then = (vars(type(held)(**{keys[-1]: n})) for n in (getattr(held, keys[-1]), number))
    except Exception:
        return {}
    lists = (n for n in now if isinstance(then.get(n), list) and now[n] != then[n] and vars(held).get(n) == now[n])
    return {(*way, name): then[name] for name in lists if (*way, name) not in but}


def _subsets(lists: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """All lists, none, and each alone."""
    yield lists
    if lists:
        yield []
    if len(lists) > 1:
        yield from ([one] for one in lists)


def _edited(config: Any, values: dict[tuple[Any, ...], Any], lists: list[tuple[Any, ...]], index: int) -> Any:
    for keys, value in values.items():
        put(config, keys, value)
    for keys in lists:
        put(config, keys, without(look(config, keys), index))
    return config


def _built(model: nn.Module, container: str, config: Any, number: int) -> nn.Module | None:
    """What a config builds, if that has so many entries and all other modules as they are."""
    try:
        trial = built(type(model), config, attention_of(model.config), "meta", torch.float32)  # type: ignore[arg-type]
        wanted = {_alike(name, container) for name, _ in model.named_modules()}
        made = {_alike(name, container) for name, _ in trial.named_modules()}
        return trial if len(trial.get_submodule(container)._modules) == number and made == wanted else None
    except Exception:
        return None


def _alike(name: str, container: str) -> str:
    """A module's path without its entry's place."""
    if not name.startswith(f"{container}."):
        return name
    _, _, rest = name[len(container) + 1 :].partition(".")
    return f"{container}.*.{rest}"


def _walk(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything within a config, with the way to it."""
    if keys:
        yield keys, value
    if len(keys) > _DEPTH:
        return
    if isinstance(value, (list, tuple)):
        items: Iterable[Any] = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    else:
        items = vars(value).items() if hasattr(value, "to_dict") else ()
    for key, inner in list(items):
        if not (isinstance(key, str) and key.startswith("_")):
            yield from _walk(inner, (*keys, key))


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
