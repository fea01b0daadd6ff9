"""A file without some of its branches and blocks, run in ONNX Runtime: what `programs` is for captured modules.

A file runs as a whole, so that no run begins in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph.errors import DataError
from depgraph.onnx_door.bypassing import leave_out
from depgraph.onnx_door.copies import Cut
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.onnx_door.observing import FileObserver
from importance.calling import inputs_of, moved
from importance.depth.candidates import named_parts

Names = frozenset[str]


class FileWay:
    """A file, and the place of each of the named branches and blocks in it; all batches go the same way."""

    held = 4
    """Files without something that are kept to be run on further batches: each holds the weights."""

    def __init__(self, graph: OnnxGraph, names: Iterable[str]) -> None:
        self.graph = graph
        index = {node.name: k for node, k in graph.residual.flow.index.items()}
        parts = named_parts(graph)
        self.starts = {name: min(index[node] for node in parts[name].nodes) for name in names}
        self.places: list[int] = []

    def part(self, removed: Names) -> FilePart:
        """The file without some."""
        return FilePart(self, removed)

    def before(self, place: int, removed: Iterable[str]) -> Names:
        """Which of `removed` start before a place."""
        return frozenset(name for name in removed if self.starts[name] < place)

    def given(self, batch: Any) -> list[Any]:
        """What of a batch the file is called with, in the order of its inputs."""
        _, kwargs = inputs_of(self.graph.model, moved(batch, torch.device("cpu")))
        if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in pytree.tree_leaves(kwargs)):
            raise DataError("a batch is empty: one of its tensors has no elements, give batches with samples in them")
        return [kwargs]


class FilePart:
    """The file of a way without the branches and blocks of `removed`."""

    def __init__(self, way: FileWay, removed: Names) -> None:
        self.way, self.removed = way, removed
        self.cuts: list[Any] = []
        self.written: set[Any] = set()

    @cached_property
    def _observer(self) -> FileObserver:
        if not self.removed:
            return FileObserver(self.way.graph)
        made = Cut.copy(self.way.graph.model)
        leave_out(self.way.graph, made, sorted(self.removed))
        return FileObserver(self.way.graph, made)

    def run(
        self,
        inputs: Iterable[Any],
        begin: Any = None,
        keep: Any = None,
        seen: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Any:
        """What the file gives without the removed parts: a tensor, or several by name; `seen` is as in `programs.Part.run`."""
        (kwargs,) = inputs
        return self._observer.call(((), kwargs), seen=seen)
