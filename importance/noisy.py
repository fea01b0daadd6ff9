"""Batches of noise for a model whose data one doesn't have: calibration as OBSPA's data-free mode does it (METHODS.md 2.13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph import DependencyGraph
from depgraph.errors import DataError
from depgraph.observing import Runnable
from depgraph.onnx_door.arrays import as_torch
from depgraph.onnx_door.graph import OnnxGraph
from importance.calling import as_batch


def noise(graph: DependencyGraph, samples: int = 128, seed: int = 0) -> list[Any]:
    """Batches of noise in the form of the graph's example inputs, as many as it takes for `samples` samples.

    Floating-point inputs are drawn from the standard normal distribution, integers that are looked up in a table evenly from
    all its rows. All else stays as in the example: booleans, other integers, whatever has "mask" in its name, and floats with
    infinities among them. The leading size of the inputs that are drawn counts as the number of samples of a batch. The same
    seed gives the same batches, on any device.

    Raises DataError: `samples` isn't a positive number, or the example has nothing that noise could stand for.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise DataError(f"noise was asked for {samples!r} samples: give a whole number, 1 or more")
    example: Any = (graph.args, dict(graph.kwargs))
    if isinstance(graph, OnnxGraph):
        example = ((), {name: as_torch(array) for name, array in graph.inputs.items()})
    given, spec = pytree.tree_flatten(example)
    leaves = _leaves(given, graph.observer().own)
    size = max((len(leaf.example) for leaf in leaves if leaf.is_drawn), default=0)
    if not size:
        raise DataError(
            f"no input of {graph.name} holds floats or points into a table: there is nothing to make noise of"
        )
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(-(-samples // size)):
        args, kwargs = pytree.tree_unflatten([leaf.made(generator) for leaf in leaves], spec)
        batches.append(as_batch(graph.model, args, kwargs))
    return batches


@dataclass(frozen=True)
class _Leaf:
    """One of the example inputs, its name in the program, and the size of the table that it points into (0: none)."""

    example: Any
    name: str
    table: int

    @property
    def is_drawn(self) -> bool:
        """Does noise take its place?"""
        leaf = self.example
        if not isinstance(leaf, Tensor) or not leaf.ndim or "mask" in self.name or leaf.dtype == torch.bool:
            return False
        if leaf.is_floating_point() or leaf.is_complex():
            return bool(torch.isfinite(leaf).all()) if not leaf.is_meta else True
        return self.table > 0

    def made(self, generator: torch.Generator) -> Any:
        """Noise like it, or itself."""
        leaf = self.example
        if not self.is_drawn:
            return leaf
        if leaf.is_floating_point() or leaf.is_complex():
            wide = torch.complex64 if leaf.is_complex() else torch.float32
            return torch.randn(leaf.shape, dtype=wide, generator=generator).to(leaf)
        return torch.randint(self.table, leaf.shape, generator=generator).to(leaf)


def _leaves(given: list[Any], own: Runnable) -> list[_Leaf]:
    """The example inputs with what a program knows of them; it may know of tensors only."""
    names = iter(own.inputs)
    all_known = len(own.inputs) == len(given)
    named = [next(names, "") if all_known or isinstance(leaf, Tensor) else "" for leaf in given]
    return [_Leaf(leaf, name, own.tables.get(name, (0, 0))[1]) for leaf, name in zip(given, named, strict=True)]
