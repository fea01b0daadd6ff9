"""Tensors that a forward keeps in dicts of its modules for the next time, and makes again where they are missing.

Such a cache, of the biases of an attention by device, say, hides from what it was made and doesn't follow a cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import unwritten
from depgraph.capture.restoring import own_containers

_OWN = frozenset(vars(nn.Module()))


def forget(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Empty the dicts of tensors that a forward of `model` on these inputs fills again with the same; the others stay."""
    alike: dict[str, dict[int, dict[Any, Any]]] = {}
    for module in model.modules():
        for name, held in vars(module).items():
            if _keeps(name, held):
                alike.setdefault(name, {})[id(held)] = held
    for kept in alike.values():
        _forget(model, (args, kwargs), list(kept.values()))


def _forget(model: nn.Module, inputs: Any, found: list[dict[Any, Any]]) -> None:
    before = [dict(held) for held in found]
    after: list[dict[Any, Any]] = [{} for _ in found]
    for held in found:
        held.clear()
    try:
        after = _made_by(model, inputs, found)
    finally:  # interrupted, too
        for held, old, new in zip(found, before, after, strict=True):
            held.clear()
            if not _same(old, new):
                held.update(old)


def _keeps(name: str, held: Any) -> bool:
    if name in _OWN or type(held) is not dict or not held:
        return False
    leaves = pytree.tree_leaves(held)
    return bool(leaves) and all(
        isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and not t.is_meta for t in leaves
    )


def _made_by(model: nn.Module, inputs: Any, found: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """What is in the dicts after a forward."""
    args, kwargs = own_containers(inputs)
    try:
        with torch.no_grad(), quiet(model), unwritten(model, inputs):
            model(*args, **kwargs)
            return [dict(held) for held in found]
    except Exception:  # a forward that can't do without isn't ours to explain
        return [{} for _ in found]


def _same(old: dict[Any, Any], new: dict[Any, Any]) -> bool:
    if old.keys() != new.keys():
        return False
    pairs = [pytree.tree_leaves([old[key], new[key]]) for key in old]
    halves = [(leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]) for leaves in pairs]
    return all(len(a) == len(b) and all(map(_equal, a, b)) for a, b in halves)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
