"""Which dims of the inputs stay free in the file: what was asked, what the default asks, and what the trace gave."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from depgraph.errors import ExportError
from exporters.calls import Call, Slot

STATIC: Mapping[str, Any] = MappingProxyType({})
"""Pass as `dynamic` to fix every dim at the example's size."""

_STYLES = 'give {"x": {0: "batch"}} as torch.export takes it, exporters.STATIC for no free size, or None for the usual'

Dims = dict[str, dict[int, Any]]
"""Input name -> dim -> name of the free dim (a string, or what torch.export takes)."""


class Guess(str):
    """A name that the default chose, because sizes of the example agree; `settled_names` may tell two apart."""


class Specialised(ExportError):
    """A dim that was to stay free is a constant of the model."""


@dataclass(frozen=True)
class Rung:
    """One request for free dims; `label` says in the report what it is."""

    dims: Dims
    label: str


def ladder(call: Call, dynamic: Any) -> tuple[Rung, ...]:
    """The requests to try, most free first: several for the default, one for what a caller asked."""
    if dynamic is not None:
        return (Rung(explicit_dims(call, dynamic), "as asked"),)
    full = _default(call)
    batch_only = {name: {d: n for d, n in dims.items() if d == 0} for name, dims in full.items()}
    rungs = [Rung(full, "batch and sequence"), Rung(_pruned(batch_only), "batch"), Rung({}, "nothing")]
    return tuple(r for i, r in enumerate(rungs) if i == 0 or r.dims != rungs[i - 1].dims)


def _default(call: Call) -> Dims:
    batched = {n: t for n, t in zip(call.names, call.tensors, strict=True) if t.ndim >= 2}
    batch = _agreed([t.shape[0] for t in batched.values()])
    vectors = {n: t for n, t in zip(call.names, call.tensors, strict=True) if t.ndim == 1 and t.shape[0] == batch}
    text = {n: t for n, t in batched.items() if t.ndim == 2 and not t.is_floating_point() and not t.is_complex()}
    length = _agreed([t.shape[1] for t in text.values()])
    dims: Dims = {}
    for name in call.names:
        if name in batched or name in vectors:
            size = call.tensors[call.names.index(name)].shape[0]
            dims[name] = {0: Guess("batch" if size in (1, batch) else f"{name}_batch")}
        if name in text:
            dims[name][1] = Guess("sequence" if text[name].shape[1] in (1, length) else f"{name}_sequence")
    return dims


def _agreed(sizes: Sequence[int]) -> int:
    """The size most inputs have; 1, which broadcasts, only if there is no other."""
    larger = [size for size in sizes if size != 1]
    return Counter(larger or [1]).most_common(1)[0][0]


def explicit_dims(call: Call, dynamic: Any) -> Dims:
    """What a caller asks, by the names of the call's inputs; raises ExportError for what isn't understood."""
    if isinstance(dynamic, (list, tuple)):
        dynamic = dict(zip(call.arguments, dynamic, strict=False))
    if not isinstance(dynamic, Mapping):
        raise ExportError(f"dynamic={dynamic!r} is no such request: {_STYLES}.")
    unknown = sorted(set(dynamic) - set(call.arguments))
    if unknown:
        raise ExportError(
            f"`dynamic` names {', '.join(map(repr, unknown))}, "
            f"but the inputs are {', '.join(map(repr, call.arguments))}."
        )
    dims: Dims = {}
    for argument, spec in dynamic.items():
        try:
            for index, axes in _pairs(call.arguments[argument], spec):
                dims[call.names[index]] = _axes(call.names[index], call.tensors[index], axes)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ExportError(f"`dynamic` says {spec!r} of {argument!r}, which isn't understood: {_STYLES}.") from error
    return _pruned(dims)


def _pairs(slot: Any, spec: Any) -> Iterator[tuple[int, Any]]:
    """Walk an argument and its spec together: (number of the tensor, what is said of its dims)."""
    if spec is None:
        return
    if isinstance(slot, Slot):
        yield slot.index, spec
        return
    items = slot.items() if isinstance(slot, dict) else enumerate(slot) if isinstance(slot, (list, tuple)) else ()
    for key, child in items:
        inner = spec.get(key) if isinstance(spec, Mapping) else spec[key]
        yield from _pairs(child, inner)


def _axes(name: str, tensor: Tensor, axes: Any) -> dict[int, Any]:
    pairs = dict(axes) if isinstance(axes, Mapping) else dict(enumerate(axes))
    wrong = [dim for dim in pairs if not -tensor.ndim <= dim < tensor.ndim]
    if wrong:
        raise ExportError(f"`dynamic` names dim {wrong[0]} of {name!r}, which has {tensor.ndim} dims.")
    return {dim % tensor.ndim: value for dim, value in pairs.items() if not _is_fixed(value)}


def _is_fixed(value: Any) -> bool:
    return value is None or isinstance(value, int) or value == torch.export.Dim.STATIC


def _pruned(dims: Dims) -> Dims:
    return {name: axes for name, axes in dims.items() if axes}


def for_torch(call: Call, dims: Dims) -> tuple[tuple[dict[int, Any] | None, ...]] | None:
    """`dims` as torch.export wants them for a `forward(self, *tensors)`; None when nothing is free."""
    if not dims:
        return None
    free = torch.export.Dim.DYNAMIC
    specs = [{d: free if isinstance(v, str) else v for d, v in dims.get(n, {}).items()} or None for n in call.names]
    return (tuple(specs),)


def enlarged(call: Call, dims: Dims) -> tuple[Tensor, ...]:
    """Examples without a free dim of size 1, which torch.export would take for a constant: those are repeated."""
    largest: Counter[Any] = Counter()
    for tensor, _, dim, name in _free(call, dims):
        largest[str(name)] = max(largest[str(name)], tensor.shape[dim])
    tensors = dict(zip(call.names, call.tensors, strict=True))
    for tensor, owner, dim, name in _free(call, dims):
        if tensor.shape[dim] == 1:
            times = max(2, largest[str(name)]) if isinstance(name, str) else 2
            tensors[owner] = tensors[owner].repeat_interleave(times, dim)
    return tuple(tensors.values())


def _free(call: Call, dims: Dims) -> Iterator[tuple[Tensor, str, int, Any]]:
    for owner, tensor in zip(call.names, call.tensors, strict=True):
        for dim, name in dims.get(owner, {}).items():
            yield tensor, owner, dim, name


def settled_names(requested: Dims, symbols: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """The final name of each free dim, given the symbol that the trace gave it.

    Dims of one symbol share a name. Where the default gave two inputs one "sequence" only because the example's sizes
    agree, and the trace kept them apart (a text and the text it is turned into), the second gets its input's name:
    ONNX Runtime may reuse one buffer for dims of one name.
    """
    names: dict[tuple[str, int], str] = {}
    by_symbol: dict[str, str] = {}
    for (owner, dim), symbol in symbols.items():
        wanted = _label(requested[owner][dim], owner, dim)
        guessed = wanted == "sequence" and isinstance(wanted, Guess)
        apart = guessed and wanted in by_symbol.values() and symbol not in by_symbol
        names[owner, dim] = by_symbol.setdefault(symbol, f"{owner}_sequence" if apart else wanted)
    return names


def _label(value: Any, owner: str, dim: int) -> str:
    if isinstance(value, str):
        return value
    named = getattr(value, "__name__", None)
    return named if isinstance(named, str) else f"{owner}_{dim}"


_PLACE = re.compile(r"\['tensors'\]\[(\d+)\]\.(?:shape|size\(\))\[(\d+)\]")
_SIGNS = ("static shape of", "specialized", "Constraints violated", "conflicts between user-specified ranges")


def specialised(error: BaseException, call: Call, dims: Dims) -> Specialised | None:
    """The dims that an error of torch.export says are constants of the model, as an error that names them.

    A size that follows from values (torch calls that specialised too) is no such dim.
    """
    chain = [str(e) for e in (error, error.__cause__, error.__context__) if e is not None]
    text = next((t for t in chain if any(sign in t for sign in _SIGNS)), None)
    if text is None or not dims or "data-dependent" in text:
        return None
    places = {(call.names[int(i)], int(d)) for i, d in _PLACE.findall(text)}
    return fixed_dims(places or {(n, d) for n, axes in dims.items() for d in axes}, dims)


def fixed_dims(places: set[tuple[str, int]], dims: Dims) -> Specialised:
    """An error that names the dims `places` (input, dim), which the model's code fixes."""
    named = ", ".join(f"dim {d} of {n!r} ({_label(dims.get(n, {}).get(d), n, d)})" for n, d in sorted(places))
    return Specialised(
        f"The model's code fixes {named} at the example's size; leave it out of `dynamic` (or pass exporters.STATIC), "
        "or make the code take that size from its input's shape."
    )
