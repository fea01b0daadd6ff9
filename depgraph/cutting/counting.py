"""What counts the entries of a container and follows when one leaves: integers and lists beside it and in a config.

A count is an integer that is the number of entries and no tensor's size comes from it, in the module that holds the container;
in the config of a model of transformers, it is one with which the config builds that many fewer entries, together with lists
that have an item for every entry, lists that the config's class computes from the count, such as names of layers, and numbers
of the first entries or lists of positions, where the entries that are left are built as they are only then.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from depgraph.capture.sizes import Attr
from depgraph.cutting.building import built
from depgraph.cutting.entries import without
from depgraph.cutting.record import attention_of, library_class
from depgraph.cutting.ways import look, put

Keys = tuple[Any, ...]
_DEPTH = 3


@dataclass
class Following:
    """What an entry's leaving changes: new integers by attribute, and which item goes from which lists.

    Of `computed` fields of the config its class computes the value, from the count that is the first of these fields.
    `places` are positions of entries: numbers of the first ones, or lists of positions.
    """

    integers: dict[Attr, int] = field(default_factory=dict)
    lists: list[tuple[Attr, int]] = field(default_factory=list)
    computed: list[Attr] = field(default_factory=list)
    places: list[Attr] = field(default_factory=list)


def kinds_of_entries(model: nn.Module, container: str) -> list[tuple[str, ...]]:
    """The kind of each entry: what lists of words say of it that have one for every entry, in the config or beside the container."""
    number = len(model.get_submodule(container)._modules)
    held = [*vars(model.get_submodule(container.rpartition(".")[0])).values()]
    held += [value for _, value in _walk(model.config, ())] if library_class(model) else []
    lists = [v for v in held if isinstance(v, (list, tuple)) and len(v) == number and all(type(w) is str for w in v)]
    return [tuple(words[k] for words in lists) for k in range(number)]


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
    trial = _Trial(model, container, index)
    edits, shown = trial.likeliest()
    if shown is None:
        return None
    found.integers.update({Attr("", "config", k): v for k, v in edits.count.items()})
    found.lists += [(Attr("", "config", k), index) for k in edits.shorter]
    found.computed += [Attr("", "config", k) for k in (*edits.count, *edits.computed)] if edits.computed else []
    found.places += [Attr("", "config", k) for k in edits.places]
    return shown


@dataclass(frozen=True)
class _Edits:
    """Changes of a config: values by the way to them, and lists that lose an item."""

    count: dict[Keys, int] = field(default_factory=dict)
    shorter: list[Keys] = field(default_factory=list)
    computed: dict[Keys, Any] = field(default_factory=dict)
    places: dict[Keys, Any] = field(default_factory=dict)


class _Trial:
    """A model of transformers, of which an entry is to leave a container, and what edited configs build in its place."""

    def __init__(self, model: nn.Module, container: str, index: int) -> None:
        self.model, self.container, self.index = model, container, index
        self.config: Any = model.config
        self.number = len(model.get_submodule(container)._modules)
        self.all = _parts(model, container)
        self.wanted = {(k - (k > index), name) for k, name in self.all if k != index}

    def likeliest(self) -> tuple[_Edits, nn.Module | None]:
        """The edits that build the entries that are left as they are or, failing that, as many, and what they build."""
        first: tuple[_Edits, nn.Module | None] = _Edits(), None
        for edits in self._edits():
            shown = self._built(edits)
            if shown is not None and self._is_exact(shown):
                return edits, shown
            first = (edits, shown) if first[1] is None and shown is not None and self._is_alike(shown) else first
        for keys, value in _places_in(self.config, self.number, [self.index]).items() if first[1] is not None else ():
            edits = _Edits(first[0].count, first[0].shorter, first[0].computed, {keys: value})
            shown = self._built(edits) if keys not in first[0].count else None
            if shown is not None and self._is_exact(shown):
                return edits, shown
        return first

    def _edits(self) -> Iterator[_Edits]:
        held = list(_walk(self.config, ()))
        lists = [keys for keys, value in held if isinstance(value, (list, tuple)) and len(value) == self.number]
        integers = [keys for keys, value in held if type(value) is int and value == self.number]
        for shorter, keys in product(_subsets(lists), [*integers, None]):
            count = {} if keys is None else {keys: self.number - 1}
            yield _Edits(count, shorter)
            computed = computed_from(self.config, keys, self.number - 1, shorter) if keys else {}
            if computed:
                yield _Edits(count, shorter, computed)

    def _built(self, edits: _Edits) -> nn.Module | None:
        """What an edited config builds, if that has as many entries as are left."""
        config = copy.deepcopy(self.config)
        try:
            for keys, value in (edits.count | edits.computed | edits.places).items():
                put(config, keys, value)
            for keys in edits.shorter:
                put(config, keys, without(look(config, keys), self.index))
            shown = built(type(self.model), config, attention_of(self.config), "meta", torch.float32)
            return shown if len(shown.get_submodule(self.container)._modules) == self.number - 1 else None
        except Exception:
            return None

    def _is_exact(self, shown: nn.Module) -> bool:
        return _parts(shown, self.container) == self.wanted

    def _is_alike(self, shown: nn.Module) -> bool:
        return {name for _, name in _parts(shown, self.container)} == {name for _, name in self.all}


def _parts(model: nn.Module, container: str) -> set[tuple[int, str]]:
    """The modules of a model: each with the position of the entry that it lies in and its path there, others with -1."""
    places = {name: k for k, name in enumerate(model.get_submodule(container)._modules)}
    found = set[tuple[int, str]]()
    for name, _ in model.named_modules():
        key, _, rest = name[len(container) + 1 :].partition(".") if name.startswith(f"{container}.") else ("", "", "")
        found.add((places[key], f"{container}.*.{rest}") if key in places else (-1, name))
    return found


def _places_in(config: Any, number: int, gone: list[int]) -> dict[Keys, Any]:
    """What in a config may be a number of the first entries, or a list of positions, and is another without those `gone`."""
    found: dict[Keys, Any] = {}
    for keys, value in _walk(config, ()):
        ways = (value,) if type(value) is int else value if type(value) in (list, tuple) else ()
        if ways and all(type(one) is int and 0 <= one <= number for one in ways):
            after = moved(value, gone)
            found |= {keys: after} if after != value else {}
    return found


def moved(value: Any, gone: Iterable[int]) -> Any:
    """A number of the first entries, or a list of positions, once entries at the positions `gone` have left."""
    left = set(gone)
    if type(value) is int:
        return value - sum(k < value for k in left)
    return type(value)(one - sum(k < one for k in left) for one in value if one not in left)


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
