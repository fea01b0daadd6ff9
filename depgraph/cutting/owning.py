"""Objects such as configs that a cut changes become the model's own first: another model may hold the same ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from depgraph.capture.attributes import assign, held_in
from depgraph.capture.restoring import is_open
from depgraph.capture.sizes import Attr

Undo = Callable[[], None]


def assign_all(model: nn.Module, values: Mapping[Attr, int], undo: list[Undo]) -> None:
    """Set integers of a model, and add to `undo` what takes that back; objects that hold some become the model's own.

    Raises CutError where the model has no such attribute.
    """
    own(model, values, undo)
    for attr, value in values.items():
        undo.append(assign(model, attr, value))


def own(model: nn.Module, attrs: Iterable[Attr], undo: list[Undo]) -> None:
    """Replace the objects in which some of `attrs` lie by copies, wherever the model holds them; tensors stay the same."""
    held = [_holder(model, attr) for attr in attrs if attr.keys]
    shared = {id(one): one for one in held if one is not None and is_open(one)}
    memo: dict[int, Any] = {id(one): one for one in (*model.modules(), *model.parameters(), *model.buffers())}
    try:
        for one in shared.values():
            copy.deepcopy(one, memo)
    except Exception:  # it can't be copied, so it is changed as it is
        return
    originals = {id(one): one for one in memo.get(id(memo), ())}
    inside = {id(vars(one)) for one in originals.values() if hasattr(one, "__dict__")} | originals.keys()
    for holder, key, value in list(held_in(model)) if originals else ():
        if id(value) in originals and id(holder) not in inside:
            _put(holder, key, memo[id(value)])
            undo.append(lambda holder=holder, key=key, value=value: _put(holder, key, value))  # type: ignore[misc]


def _put(holder: Any, key: Any, value: Any) -> None:
    (dict if isinstance(holder, dict) else list).__setitem__(holder, key, value)


def _holder(model: nn.Module, attr: Attr) -> Any:
    """The object, list or dict that a module holds and an attribute lies in; None where there is none."""
    try:
        return getattr(model.get_submodule(attr.module), attr.name)
    except AttributeError:
        return None
