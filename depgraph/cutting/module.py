"""Cutting in the module: its tensors are narrowed, its integers follow, everything else stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depgraph.capture.places import place
from depgraph.capture.recording import assign
from depgraph.cutting.descriptors import flatten, follow
from depgraph.cutting.expressing import Solution
from depgraph.cutting.hook_weights import compute_again, plain_copy
from depgraph.cutting.owning import assign_all
from depgraph.cutting.slicing import sliced_tensor
from depgraph.errors import CutError
from depgraph.graph import Value
from depgraph.offloading import offloaded
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Undo = Callable[[], None]


def narrowed(kept: Kept) -> list[Value]:
    """Parameters, buffers and constants that the cut makes smaller."""
    return [v for v in kept.smaller().values() if v.kind in ("parameter", "buffer", "constant") and v.target]


def new_tensor(old: torch.Tensor, kept: Kept, value: Value) -> torch.Tensor:
    """A narrowed copy of `old`, of the same kind (parameter or not), dtype, device, requires_grad, with its hooks."""
    return _alike(old, lambda tensor: sliced_tensor(tensor, kept, value))


def _alike(old: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A new tensor with the changed data and gradient of `old`, and all else that `old` carries."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        changed = change(tensor)
        return tensor.clone() if changed is tensor else changed.contiguous()

    fresh = copied(old.detach())
    if not isinstance(old, nn.Parameter):
        return fresh
    fresh = dressed(old, nn.Parameter(fresh, requires_grad=old.requires_grad))
    for hook in (getattr(old, "_backward_hooks", None) or {}).values():
        fresh.register_hook(hook)
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        fresh.register_post_accumulate_grad_hook(hook)
    if old.grad is not None:
        fresh.grad = copied(old.grad)
    return fresh


def dressed(old: torch.Tensor, fresh: nn.Parameter) -> nn.Parameter:
    """A new parameter with the class and the attributes of `old`."""
    if issubclass(type(old), nn.Parameter):
        fresh.__class__ = type(old)  # type: ignore[assignment]
    fresh.__dict__.update(old.__dict__)
    return fresh


def cut_copy(graph: DependencyGraph, kept: Kept, solution: Solution) -> nn.Module:
    """A new module with narrowed tensors; weights are copied once, and already cut."""
    memo: dict[int, Any] = {id(old): new for old, new in _replacements(graph, kept).values()}
    away = offloaded(graph.model)
    for name, tensor in graph.held().items():
        if id(tensor) not in memo and name not in away:
            memo[id(tensor)] = _alike(tensor, lambda same: same)
    model = plain_copy(graph.model, memo)
    for attr, value in solution.attributes.items():
        assign(model, attr, value)
    compute_again(model)
    follow(model, [])
    flatten(model)
    return model


def cut_in_place(graph: DependencyGraph, kept: Kept, solution: Solution) -> Undo:
    """Narrow the graph's own model; the function returned takes everything back."""
    model = graph.model
    if offloaded(model):
        raise CutError(
            f"{type(model).__name__} can't be cut in place, as its weights are offloaded: use plan.apply(), which gives a new model"
        )
    undo: list[Undo] = [lambda: flatten(model), lambda: compute_again(model)]
    by_id = {id(old): new for old, new in _replacements(graph, kept).values()}
    try:
        replace_tensors(model, by_id, undo)
        assign_all(model, solution.attributes, undo)
        compute_again(model)
        follow(model, undo)
        flatten(model)
    except BaseException:
        take_back(undo)
        raise
    return lambda: take_back(undo)


def take_back(undo: list[Undo]) -> None:
    """Undo in reverse order."""
    while undo:
        undo.pop()()


def without_indices(old: torch.Tensor, dim: int, gone: list[int]) -> torch.Tensor:
    """A copy of `old`, of the same kind, without some indices of a dim."""
    stays = [k for k in range(old.shape[dim]) if k not in set(gone)]
    return _alike(old, lambda tensor: tensor.index_select(dim, torch.tensor(stays, device=tensor.device)))


def replace_tensors(model: nn.Module, by_id: dict[int, torch.Tensor], undo: list[Undo]) -> None:
    """Put the successors of tensors, by their identity, in their place; what takes it back is added to `undo`."""
    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            _swap(holder, by_id, undo)


def _swap(holder: Any, by_id: dict[int, torch.Tensor], undo: list[Undo]) -> None:
    """Replace the tensors in a dict or list that a module holds, and in those within."""
    for key, old in list(enumerate(holder) if isinstance(holder, list) else holder.items()):
        if isinstance(old, torch.Tensor) and id(old) in by_id:
            holder[key] = by_id[id(old)]
            undo.append(lambda key=key, old=old: holder.__setitem__(key, old))  # type: ignore[misc]
        elif type(old) in (list, dict) and any(isinstance(o, torch.Tensor) for o in _items(old)):
            _swap(old, by_id, undo)


def _items(held: dict[Any, Any] | list[Any]) -> Any:
    return held.values() if isinstance(held, dict) else held


def _replacements(graph: DependencyGraph, kept: Kept) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """For each tensor object that gets smaller: itself and its successor."""
    tensors, held = graph.tensors(), graph.held()
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for value in narrowed(kept):
        old = held.get(value.target)
        if old is None:
            old = plain_tensor(graph, value)
        if old is None:
            raise CutError(
                f"the code of {type(graph.model).__name__} can't express this cut{_read_at(graph, value)}: a tensor of shape "
                f"{list(value.shape)} that no attribute holds would need fewer indices; use form='graph' (or 'auto'), or plan with "
                "form='module' to leave such axes whole"
            )
        if id(old) not in found:
            read = _reading(tensors, value.target)
            found[id(old)] = (old, _alike(old, lambda t, v=value, read=read: sliced_tensor(read(t), kept, v)))  # type: ignore[misc]
    return found


def _read_at(graph: DependencyGraph, value: Value) -> str:
    """Where the code first reads a captured constant, as part of a sentence."""
    exported = graph.capture.exported
    names = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.target == value.target}
    places = (place(user) for node in exported.graph.nodes if node.name in names for user in node.users)
    return next((f", {found}" for found in places if found), "")


def _reading(tensors: Mapping[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives the numbers of a tensor that the model holds, from elsewhere where it has none itself."""
    return lambda held: tensors[name] if held.is_meta and name in tensors else held


def plain_tensor(graph: DependencyGraph, value: Value) -> torch.Tensor | None:
    """The tensor attribute (no parameter, no buffer) of some module that a captured constant came from."""
    constant = graph.capture.exported.constants.get(value.target)
    if constant is None or constant.device.type == "meta":
        return None
    for module in graph.model.modules():
        for held in vars(module).values():
            if isinstance(held, torch.Tensor) and (held is constant or held.data_ptr() == constant.data_ptr() != 0):
                return held
    return None
