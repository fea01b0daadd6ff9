"""From the record of a cut to a model of the same shape, without its weights; then the weights are put in.

A module form needs no capture: its tensors are narrowed and its integers set as recorded. A graph form is captured again
from the original on inputs like the recorded ones, and cut by the recorded groups.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depgraph.capture.capturing import quiet
from depgraph.capture.forgetting import forget
from depgraph.capture.recording import current
from depgraph.capture.reserved_names import Apart
from depgraph.cutting.descriptors import flatten, follow
from depgraph.cutting.hook_weights import compute_again
from depgraph.cutting.inputs import make_inputs
from depgraph.cutting.inserting import again, untie
from depgraph.cutting.module import dressed, take_back
from depgraph.cutting.owning import assign_all
from depgraph.cutting.program import cut_programs
from depgraph.cutting.record import Record, attr_of
from depgraph.cutting.shortening import Shortening, shorten
from depgraph.dependency import trace
from depgraph.errors import CheckpointError, CutError, DepgraphError
from depgraph.plan import Plan

Undo = Callable[[], None]
Table = Mapping[str, Mapping[str, Any]]
GRAPHS = ("graph", "products")
"""The forms of cuts that give a graph, whose code isn't the module's."""
_OWN = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Held:
    """A tensor of a module: `kind` is "parameter", "buffer" or "attribute" (a plain tensor)."""

    kind: str
    tensor: torch.Tensor


def held_tensors(model: nn.Module) -> dict[str, Held]:
    """All tensors that the modules of `model` hold, by name; tied ones under every name."""
    return {name: Held(kind, store[key]) for name, kind, store, key in _slots(model)}


def _slots(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    for path, module in model.named_modules(remove_duplicate=False):
        stores = (("parameter", module._parameters), ("buffer", module._buffers), ("attribute", vars(module)))
        for kind, store in stores:
            held = [key for key, value in store.items() if isinstance(value, torch.Tensor) and key not in _OWN]
            yield from ((f"{path}.{key}" if path else key, kind, store, key) for key in held)


def tensor_table(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind, shape, dtype and requires_grad of every tensor, or the earlier name of the same one: JSON-able."""
    table: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, held in held_tensors(model).items():
        tensor = held.tensor
        entry: dict[str, Any] = {"kind": held.kind, "shape": list(tensor.shape)}
        entry["dtype"] = str(tensor.dtype).removeprefix("torch.")
        if held.kind == "parameter":
            entry["requires_grad"] = tensor.requires_grad
        if first.setdefault(id(tensor), name) != name:
            entry["same_as"] = first[id(tensor)]
        table[name] = entry
    return table


def original_from_library(original: Mapping[str, Any], config: Any, device: torch.device | str) -> nn.Module:
    """A model of transformers with that config (a config or its dict), on `device`, with weights that nothing initialised.

    `original` says its `class` and kind of `attention`. Raises CheckpointError when transformers has no such class or
    can't build it.
    """
    import transformers
    from transformers import initialization

    kind: Any = getattr(transformers, str(original["class"]), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no class {original['class']!r}: pass model="
        )
    try:
        config = kind.config_class.from_dict(config) if isinstance(config, dict) else config
        if original.get("attention"):
            config._attn_implementation = original["attention"]
        with torch.device(device), initialization.no_init_weights():
            model = kind(config)
        model.tie_weights()
    except Exception as error:
        raise CheckpointError(
            f"{original['class']} can't be built from the saved config: {type(error).__name__}: {error}"
        ) from error
    return model.eval()


def check_fits(model: nn.Module, table: Table, made: list[Record]) -> None:
    """Is `model` what the cuts started from, by names, shapes and integers?

    Raises CheckpointError that names the first parameter, or attribute, that doesn't fit.
    """
    name = type(model).__name__
    is_graph = any(cut["form"] in GRAPHS for cut in made)
    names = Apart(held_tensors(model) if is_graph else ())
    held = {names.there(target): one for target, one in held_tensors(model).items()}
    gone = _removed_counts(table, made, names)
    added = {entry["target"] for cut in made for entry in cut.get("added", ())}
    if any(cut["form"] == "depth" for cut in made):
        return  # names have moved: what leaves and `fill` say what doesn't fit
    for target, entry in table.items():
        if target not in held:
            if entry["kind"] == "attribute" or (is_graph and entry["kind"] != "parameter") or target in added:
                continue
            raise CheckpointError(
                f"the given {name} has no {entry['kind']} {target!r}, which was saved: pass the model that was cut"
            )
        shape = list(held[target].tensor.shape)
        dense = [size + gone.get((_root(table, target), d), 0) for d, size in enumerate(entry["shape"])]
        if shape != dense and entry["kind"] == "parameter":
            was = f"cut from {dense}" if dense != entry["shape"] else f"{dense}"
            raise CheckpointError(
                f"{entry['kind']} {target!r} has shape {shape} in the given {name}, the saved one was {was}"
            )
    extra = [target for target, h in held.items() if target not in table and h.kind != "attribute" and not is_graph]
    if extra:
        raise CheckpointError(
            f"the given {name} has {held[extra[0]].kind} {extra[0]!r}, which wasn't saved: pass the model that was cut"
        )
    if not is_graph:
        _check_attributes(model, made)


def _root(table: Table, name: str) -> str:
    return str(table[name].get("same_as", name)) if name in table else name


def _removed_counts(table: Table, made: list[Record], names: Apart) -> dict[tuple[str, int], int]:
    """How many indices all cuts together removed from each dim of each tensor (ties under their first name)."""
    counts: dict[tuple[str, int], int] = {}
    for cut in made:
        here = {(_root(table, names.there(r["target"])), r["dim"]): len(r["indices"]) for r in cut["removed"]}
        for key, n in here.items():
            counts[key] = counts.get(key, 0) + n
    return counts


def _check_attributes(model: nn.Module, made: list[Record]) -> None:
    first: dict[Any, int] = {}
    for cut in made:
        for change in cut["attributes"]:
            first.setdefault(attr_of(change), change["before"])
    for attr, before in first.items():
        try:
            now = current(model, attr)
        except CutError as error:
            raise CheckpointError(f"the given {type(model).__name__} doesn't fit: it has no {attr}") from error
        if now != before:
            raise CheckpointError(
                f"{attr} is {now} in the given {type(model).__name__}, it was {before} in the one that was cut"
            )


def run_once(model: nn.Module, made: list[Record]) -> None:
    """Run `model` on inputs like those that it was first traced with, if it can be: it may keep tensors from then on."""
    with contextlib.suppress(Exception), quiet(model), torch.no_grad():
        args, kwargs = make_inputs(made[0]["inputs"], next(model.parameters()).device)
        model(*args, **kwargs)


def forget_kept(model: nn.Module, made: list[Record]) -> None:
    """Let `model`, which may have been run, forget what a forward on inputs like the recorded ones makes again."""
    if "unknown" not in made[0]["inputs"]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        forget(model, *make_inputs(made[0]["inputs"], device))


def cut_again(model: nn.Module, made: list[Record], device: torch.device | str, undo: list[Undo]) -> nn.Module:
    """Make the recorded cuts again, without the check: `model` is narrowed, or a graph of it is returned."""
    for cut in made:
        if cut["form"] == "depth":
            undo.append(_shortened(model, cut))
        elif cut["form"] == "module":
            _narrow(model, cut, undo)
        else:
            undo.append(untie(model, cut.get("untied", ())))
            _as_before(model, cut, device)
            model = _GRAPHS[cut["form"]](model, cut, device)
    return model


def _shortened(model: nn.Module, cut: Record) -> Undo:
    try:
        return shorten(model, Shortening.from_json(cut["shortening"]))
    except CutError as error:
        raise CheckpointError(f"{error}: pass the model that was cut") from error


def _narrow(model: nn.Module, cut: Record, undo: list[Undo]) -> None:
    held = held_tensors(model)
    shapes: dict[int, list[int]] = {}
    for r in {(r["target"], r["dim"]): r for r in cut["removed"]}.values():
        if r["target"] in held:
            tensor = held[r["target"]].tensor
            shapes.setdefault(id(tensor), list(tensor.shape))[r["dim"]] = tensor.shape[r["dim"]] - len(r["indices"])
    fresh = {id(h.tensor): _empty(h.tensor, shapes[id(h.tensor)]) for h in held.values() if id(h.tensor) in shapes}
    _replace(model, lambda name, old: fresh.get(id(old), old), undo)
    assign_all(model, {attr_of(change): change["after"] for change in cut["attributes"]}, undo)
    compute_again(model)
    follow(model, undo)
    flatten(model)
    for added in cut.get("added", ()):
        _add(model, added, undo)


def _add(model: nn.Module, added: Record, undo: list[Undo]) -> None:
    """Make a parameter, such as a bias, that the original hasn't; like the first of its module."""
    path, _, name = added["target"].rpartition(".")
    owner = model.get_submodule(path)
    like = next(iter(owner.parameters(recurse=False)), torch.empty(0))
    before = owner._parameters.get(name)
    owner._parameters[name] = nn.Parameter(like.detach().new_empty(added["shape"]), requires_grad=like.requires_grad)
    undo.append(lambda: owner._parameters.__setitem__(name, before))


def _empty(old: torch.Tensor, shape: list[int], **changes: Any) -> torch.Tensor:
    return as_kind(old, old.detach().new_empty(shape, **changes))


def as_kind(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`new` as a parameter where `old` is one, with what was hung on it."""
    if not isinstance(old, nn.Parameter):
        return new
    return dressed(
        old, nn.Parameter(new, requires_grad=old.requires_grad and (new.is_floating_point() or new.is_complex()))
    )


def _replace(model: nn.Module, successor: Callable[[str, torch.Tensor], torch.Tensor], undo: list[Undo]) -> None:
    undo.append(lambda: flatten(model))
    for name, _, store, key in list(_slots(model)):
        old = store[key]
        new = successor(name, old)
        if new is not old:
            store[key] = new
            undo.append(lambda store=store, key=key, old=old: store.__setitem__(key, old))  # type: ignore[misc]


def _as_before(model: nn.Module, cut: Record, device: torch.device | str) -> None:
    """Every tensor on `device` and of the dtype that it had when the graph was captured; ties stay."""
    dtypes = cut["original"].get("dtypes", {})
    fresh: dict[int, torch.Tensor] = {}

    def successor(name: str, old: torch.Tensor) -> torch.Tensor:
        dtype = getattr(torch, dtypes[name]) if name in dtypes else old.dtype
        if (old.device.type, old.dtype) == (torch.device(device).type, dtype):
            return old
        return fresh.setdefault(id(old), _empty(old, list(old.shape), device=device, dtype=dtype))

    _replace(model, successor, [])
    flatten(model)


def _cut_graph(model: nn.Module, cut: Record, device: torch.device | str) -> nn.Module:
    name = type(model).__name__
    try:
        args, kwargs = make_inputs(cut["inputs"], device)
        plan = Plan.of(trace(model, args, kwargs, free=cut["free"]), cut["groups"], branches=cut.get("branches", ()))
    except CheckpointError:
        raise
    except DepgraphError as error:
        raise CheckpointError(f"the given {name} doesn't fit the saved cut: {error}") from error
    again = {(r.target, r.dim): r.indices.tolist() for r in plan.removed()}
    recorded = {(r["target"], r["dim"]): r["indices"] for r in cut["removed"]}
    if again != recorded:
        differing = next(key for key in {**recorded, **again} if again.get(key) != recorded.get(key))
        raise CheckpointError(
            f"cutting {name} again narrows {differing[0]!r} differently: is it the model that was cut?"
        )
    return next(itertools.islice(cut_programs(plan), cut.get("way", 0), None)).model


def _with_products(model: nn.Module, cut: Record, device: torch.device | str) -> nn.Module:
    try:
        args, kwargs = make_inputs(cut["inputs"], device)
        return again(trace(model, args, kwargs, free=cut["free"]), cut)
    except CheckpointError:
        raise
    except (DepgraphError, KeyError) as error:
        raise CheckpointError(f"the given {type(model).__name__} doesn't fit the saved products: {error}") from error


_GRAPHS = {"graph": _cut_graph, "products": _with_products}


def fill(model: nn.Module, table: Table, tensors: Mapping[str, torch.Tensor], undo: list[Undo]) -> None:
    """Put the loaded tensors in, tied where they were, with requires_grad as it was.

    Raises CheckpointError that names the first tensor whose place has another name or shape.
    """
    made: dict[str, torch.Tensor] = {}

    def successor(name: str, old: torch.Tensor) -> torch.Tensor:
        entry = table.get(name)
        if entry is None:
            return old
        if entry["kind"] == "parameter" and list(old.shape) != entry["shape"]:
            raise CheckpointError(
                f"{name!r} has shape {list(old.shape)} after the recorded cuts, saved is {entry['shape']}"
            )
        root = _root(table, name)
        if root not in made:
            made[root] = as_kind(old, tensors[root])
            if isinstance(made[root], nn.Parameter):
                made[root].requires_grad_(table[root].get("requires_grad", False))
        return made[root]

    _replace(model, successor, undo)
    flatten(model)
    missing = [n for n, entry in table.items() if _root(table, n) not in made and entry["kind"] != "attribute"]
    if missing:
        raise CheckpointError(
            f"{type(model).__name__} has no place for the saved {missing[0]!r} after the recorded cuts"
        )


__all__ = [
    "GRAPHS",
    "Held",
    "check_fits",
    "cut_again",
    "fill",
    "held_tensors",
    "original_from_library",
    "run_once",
    "take_back",
    "tensor_table",
]
