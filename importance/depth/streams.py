"""The stream in front of and behind each block or branch, on calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from depgraph import DependencyGraph
from importance.calling import named_inputs
from importance.depth.batches import Given, given
from importance.depth.candidates import ends_of, named_parts
from importance.depth.files import FileWay
from importance.depth.programs import Way


class Stream(NamedTuple):
    """A part's input and output [..., features], in float64, and the mask [samples, tokens] of the batch if it has one."""

    entering: Tensor
    leaving: Tensor
    mask: Tensor | None


def streams(graph: DependencyGraph, batches: Iterable[Any], names: tuple[str, ...]) -> Iterator[dict[str, Stream]]:
    """For each batch the streams around the named parts, by name. Raises DataError as `batches.given` does."""
    for data in given(graph, batches, names):
        parts = named_parts(data.way.graph)
        ends = {name: ends_of(parts[name]) for name in names}
        made = _seen(data, {node for pair in ends.values() for node in pair})
        mask = _mask(graph, data.batch)
        found = {}
        for name, (first, last) in ends.items():
            entering, leaving = (_features_last(data.way, node, made[node]) for node in (first, last))
            found[name] = Stream(entering.reshape(leaving.shape), leaving, mask if _fits(mask, leaving) else None)
        yield found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine over the last dim; 1 where nothing differs, as between zeros."""
    found = F.cosine_similarity(a, b, dim=-1, eps=0.0 if a.dtype == torch.float64 else 1e-12)
    return torch.where((a == b).all(dim=-1), 1.0, found.nan_to_num(0.0)).clamp(-1, 1)


def _seen(data: Given, nodes: set[str]) -> dict[str, Tensor]:
    """What these nodes make of a batch."""
    part, made = data.way.part(frozenset()), dict[str, Tensor]()
    copied = bool(part.written)

    def note(name: str, tensor: Tensor) -> None:
        made[name] = tensor.clone() if copied else tensor

    part.run(data.leaves, seen={name: lambda tensor, name=name: note(name, tensor) for name in nodes})  # type: ignore[misc]
    return made


def _features_last(way: Way | FileWay, node: str, tensor: Tensor) -> Tensor:
    """A value in float64, its features last: the only dim that the model's weights have too, else the usual one."""
    value = way.graph.capture.program.values.get(node)
    known = [d for d in range(tensor.ndim) if value is not None and way.graph.widths.axes_of(value.dim(d))]
    usual = 1 if tensor.ndim > 3 else tensor.ndim - 1
    return tensor.double().movedim(known[0] if len(known) == 1 else usual, -1)


def _mask(graph: DependencyGraph, batch: Any) -> Tensor | None:
    found = named_inputs(graph.model, batch).get("attention_mask")
    return found if isinstance(found, Tensor) else None


def _fits(mask: Tensor | None, stream: Tensor) -> bool:
    """Has a mask one number for each place of a stream?"""
    return mask is not None and mask.shape == stream.shape[:-1]
